"""An encoder in place of local inference: the variational auto-encoder's q, here to show posterior collapse.

Shapes: F numbers of all sites together.
"""

from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.contracts import Batch, Init, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.mean_field import MeanField
from ltm_pyro.inference.latent_sites import Sites, prior_sites
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.nn.transformer import Transformer
from ltm_pyro.utils.rng import seeded


class Amortized(MeanField, nn.Module):
    r"""The mean-field Gaussian, its parameters read off the tokens by a network that the slow step trains.

    .. math:: q_\phi(z \mid x_i) = \mathcal{N}(z; \mu_\phi(x_i), \mathrm{diag}\, \sigma_\phi^2(x_i))

    The network is a Transformer of the decoder's kind that reads the scored tokens and averages what it makes of each.
    Its last layer is 0 at first: q begins at the prior. There are no fast steps, but ``steps: 0`` still means no
    inference. Local parameters are `MeanField`'s. Sources: Kingma & Welling 2014 (arXiv 1312.6114); arXiv 2502.01567
    compares with it.

    Args:
        model: whose sites q covers and whose vocabulary it reads; it is looked at once and not kept.
        layers, width, heads: of the network.
        window: tokens that each token sees back.
    """

    uses_fast_steps = False

    def __init__(self, model: Model, layers: int = 2, width: int = 128, heads: int = 4, window: int = 128) -> None:
        nn.Module.__init__(self)
        MeanField.__init__(self, model)
        with seeded(0):
            local = self.init(prior_sites(model, 1), Init())
        self.sizes = {name: x[0].numel() for name, x in local.items()}
        self.embedding = nn.Embedding(_vocabulary(model), width)
        self.read = Transformer(layers, width, heads, window)
        self.leave = nn.Linear(width, sum(self.sizes.values()))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """The prior's moments, whatever ``start`` says: what the network adds must mean the same everywhere."""
        return super().init(sites, Init())

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """The prior's moments, moved by what the network says; where q was before does not matter."""
        local = self.init(prior_sites(model, batch.size), Init())
        parts = zip(self.sizes, self.encode(batch).split(list(self.sizes.values()), dim=-1), strict=True)
        return {name: local[name] + part.reshape(local[name].shape) for name, part in parts}

    def encode(self, batch: Batch) -> Float[Tensor, "B F"]:
        """The moves of all of q's parameters in a row, from the tokens that ``batch.mask_BT`` keeps."""
        hidden_BTD = self.read(self.embedding(batch.targets_BT))
        with full_precision(hidden_BTD):
            kept_BT1 = batch.mask_BT[..., None].to(self.leave.weight.dtype)
            mean_BD = (hidden_BTD * kept_BT1).sum(1) / kept_BT1.sum(1).clamp(min=1)
            return self.leave(mean_BD)


def _vocabulary(model: Model) -> int:
    vocabulary = getattr(getattr(model, "decoder", None), "vocabulary", None)
    if vocabulary is None:
        raise UsageError("Amortized reads tokens, but this model has no decoder with a vocabulary: use another guide.")
    return vocabulary
