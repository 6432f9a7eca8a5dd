"""A guide in a file of your own: independent logistic distributions, which have heavier tails than normals.

ltm fit --config studies/recipes/quickstart.yaml --model.guide examples/my_guide.py:LogisticGuide
"""

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import Distribution, biject_to

from ltm_pyro import Batch, Guide, Init, Model
from ltm_pyro.inference.latent_sites import prior_moments, prior_sites


class LogisticGuide(Guide):
    r"""Independent logistic distributions on the unconstrained coordinates of every latent site.

    .. math:: q(z \mid x_i) = \prod_n \mathrm{Logistic}(z_n; m_{in}, s_{in})
    """

    def __init__(self, model: Model) -> None:
        # For every latent site of the model: the map from unconstrained coordinates to the site's support.
        self.bijections = {name: biject_to(fn.support) for name, fn in prior_sites(model, 1).items()}

    def init(self, sites: Mapping[str, Distribution], init: Init) -> dict[str, Tensor]:
        """The initial local parameters, each with the sequences as its first axis; the fast steps optimise them."""
        local = {}
        for name in self.bijections:
            mean, variance = prior_moments(sites[name])  # of the unconstrained coordinates
            local[f"{name}_loc"] = mean
            local[f"{name}_log_scale"] = (variance.log() + init.log_var) / 2
        return local

    def __call__(self, batch: Batch, local: dict[str, Tensor]) -> None:
        """Samples every latent site inside the plate of sequences."""
        with pyro.plate("sequences", batch.size, dim=-1):
            for name, bijection in self.bijections.items():
                loc, scale = local[f"{name}_loc"], local[f"{name}_log_scale"].exp()
                q = dist.Logistic(loc, scale).to_event(loc.dim() - 1)
                pyro.sample(name, dist.TransformedDistribution(q, bijection))
