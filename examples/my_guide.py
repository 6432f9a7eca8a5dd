"""A guide of your own, in a file of your own: each number of a thought is logistic, with heavier tails than a normal's.

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
    r"""Independent logistics on the unconstrained coordinates of every site.

    .. math:: q(z \mid x_i) = \prod_n \mathrm{Logistic}(z_n; m_{in}, s_{in})
    """

    def __init__(self, model: Model) -> None:
        self.supports = {name: biject_to(fn.support) for name, fn in prior_sites(model, 1).items()}

    def init(self, sites: Mapping[str, Distribution], init: Init) -> dict[str, Tensor]:
        """A mean and a log-scale per coordinate, first axis the sequences: what the fast steps move."""
        moments = {name: prior_moments(sites[name]) for name in self.supports}
        means = {f"{name}_loc": mean for name, (mean, _) in moments.items()}
        return means | {f"{name}_log_scale": (v.log() + init.log_var) / 2 for name, (_, v) in moments.items()}

    def __call__(self, batch: Batch, local: dict[str, Tensor]) -> None:
        """Samples every site inside the plate of sequences, reparameterised."""
        with pyro.plate("sequences", batch.size, dim=-1):
            for name, support in self.supports.items():
                loc, scale = local[f"{name}_loc"], local[f"{name}_log_scale"].exp()
                q = dist.Logistic(loc, scale).to_event(loc.dim() - 1)
                pyro.sample(name, dist.TransformedDistribution(q, support))
