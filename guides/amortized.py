"""An encoder in place of local inference, as in a variational autoencoder: a baseline that shows posterior collapse.

Shapes: F local parameters of all sites together.
"""

from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.contracts import Batch, Init, LocalParameters, Model
from ltm_pyro.errors import UsageError
from ltm_pyro.guides.mean_field import MeanField
from ltm_pyro.inference.covariates import prior_arguments
from ltm_pyro.inference.latent_sites import Sites, check_coordinates, prior_sites
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.nn.transformer import Transformer
from ltm_pyro.utils.rng import seeded


class Amortized(MeanField, nn.Module):
    r"""The mean-field Gaussian, with parameters that an encoder computes from the tokens; the slow step trains it.

    .. math:: q_\phi(z \mid x_i) = \mathcal{N}(z; \mu_\phi(x_i), \mathrm{diag}\, \sigma_\phi^2(x_i))

    The encoder is a small causal Transformer over the scored tokens; its hidden states are averaged over them and
    projected. The projection starts at 0, so that q starts at the prior. There are no fast steps, but with ``steps: 0``
    the encoder is not used and q stays at the prior. Local parameters are `MeanField`'s. Sources: Kingma & Welling 2014
    (arXiv 1312.6114); arXiv 2502.01567 compares with it.

    Args:
        model: whose latent sites q covers and whose vocabulary the encoder has; it is traced once and not stored.
        layers, width, heads: of the encoder.
        window: tokens that each token attends to, itself included.

    Raises:
        UsageError: the model has no ``decoder.vocabulary``, or no thoughts (K = 0).
    """

    uses_fast_steps = False

    def __init__(self, model: Model, layers: int = 2, width: int = 128, heads: int = 4, window: int = 128) -> None:
        nn.Module.__init__(self)
        check_coordinates(self, prior_sites(model, 1))
        MeanField.__init__(self, model)
        with seeded(0):
            local = self.init(prior_sites(model, 1), Init())
        self.sizes = {name: x[0].numel() for name, x in local.items()}
        # Checkpoints contain these three names.
        self.embedding = nn.Embedding(_vocabulary(model), width)
        self.read = Transformer(layers, width, heads, window)
        self.leave = nn.Linear(width, sum(self.sizes.values()))  # output projection
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def init(self, sites: Sites, init: Init) -> LocalParameters:
        """The prior's moments; ``init`` is ignored, because the encoder predicts differences from them."""
        return super().init(sites, Init())

    def finalize(self, model: Model, batch: Batch, local: LocalParameters, steps: int, rate: float) -> LocalParameters:
        """The prior's moments plus the encoder's output; the current ``local`` is ignored."""
        local = self.init(prior_sites(model, *prior_arguments(model, batch)), Init())
        parts = zip(self.sizes, self.encode(batch).split(list(self.sizes.values()), dim=-1), strict=True)
        return {name: local[name] + part.reshape(local[name].shape) for name, part in parts}

    def encode(self, batch: Batch) -> Float[Tensor, "B F"]:
        """The additions to q's initial parameters, concatenated, from the tokens that ``batch.mask_BT`` keeps."""
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
