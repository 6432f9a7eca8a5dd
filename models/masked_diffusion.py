"""Masked diffusion as a Pyro program: which tokens are masked is latent, and the bound is that of any order.

Shapes: B sequences (S particles in front), T tokens, V vocabulary, D width.
"""

from typing import Any, NoReturn, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import PyroModule
from torch import Tensor, nn

from ltm_pyro.contracts import TOKENS, Batch, Prior, sequence_plate
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.check_prior import check_prior
from ltm_pyro.inference.masking import ORDER, SHARE, choose_masked, mask_laws
from ltm_pyro.models.denoiser import Denoiser
from ltm_pyro.nn.cross_entropy import LateGradient
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.nn.token_categorical import TokenCategorical

LENGTH = "length"  # the observed site of a text's number of tokens


class MaskedDiffusionModel(PyroModule):
    r"""Absorbing-state ("masked") diffusion over the tokens of a text, with a network that sees no time.

    .. math:: -\log p(x) \le -\log p(n) + E_{m} \, E_{M : |M| = m} \Big[ \frac{n}{m}
        \sum_{i \in M} -\log p_\theta(x_i \mid x_{\setminus M}, n) \Big], \quad m \sim \mathrm{Uniform}\{1 \ldots n\}

    M is a random subset of the n tokens. The right side is the average over all orders of the negative log-likelihood
    of writing the tokens in that order (Uria et al. 2014, arXiv 1310.1757; Hoogeboom et al. 2022, arXiv 2110.02037).
    It is the continuous-time bound of MDLM (Sahoo et al. 2024, arXiv 2406.07524, equation 10), whatever its noise
    schedule: with the masked fraction t uniform, :math:`\int_0^1 \frac{1}{t} \binom{n}{m} t^m (1 - t)^{n - m} dt = 1 /
    m`; but without the infinite variance of 1/t. It is also that of SEDD's absorbing variant (Lou et al. 2024, arXiv
    2310.16834), whose network gives ratios p(x_i = v | …) / p(mask) in place of probabilities (Ou et al. 2024, arXiv
    2406.03736).

    The network sees how long a text is, and a row of tokens is one document that ends behind its end, so p(n) is a
    part of the model, a learned frequency of every length: otherwise the length would be a gift that no autoregressive
    model gets. Tokens that are not scored, such as a prompt, are never masked, and n then counts from a law cut at
    their number.

    The masked share and the order in which tokens are masked are latent sites whose guide is
    `ltm_pyro.guides.Masking`; their KL is 0. What is observed given them is one draw of the right side, not a
    probability, so that only ``bound`` is defined: no importance weights, and no prediction of the next token.

    Args:
        prior: of no thoughts; as a recipe gives it to every model.
        decoder: a `Denoiser`.

    Raises:
        UsageError: the decoder is another network.
    """

    only_bound = "masked diffusion has a bound on -log p(x), and no p(x | z) to weight or to predict with"

    def __init__(self, prior: Prior, decoder: nn.Module) -> None:
        super().__init__()
        if not isinstance(decoder, Denoiser):
            raise UsageError(
                f"Masked diffusion needs a network that sees both sides of a gap, and {type(decoder).__name__} does "
                f"not: set `model.decoder` to ltm_pyro.models.Denoiser."
            )
        self.prior = prior
        self.decoder = decoder
        self.length_logits_T = nn.Parameter(torch.zeros(decoder.length))
        check_prior(self)

    def sample_prior(self, size: int) -> Float[Tensor, "... L K D"]:
        """Samples no thoughts, for ``size`` sequences."""
        with sequence_plate(size), full_precision(self.length_logits_T):
            return self.prior()

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is: all of the network depends on what is masked.

        Raises `UsageError` for tokens beyond the vocabulary.
        """
        batch.check_tokens(self.decoder.vocabulary)
        return batch

    def forward(self, batch: Batch, use_thoughts: bool = True) -> Float[Tensor, "... L K D"]:
        """Samples what is masked, then observes length and tokens; returns the empty thoughts.

        Raises `UsageError` without ``batch.targets_BT``: a text is not sampled in one pass.
        """
        if batch.targets_BT is None:
            raise UsageError("Masked diffusion samples no text in one pass: use ltm_pyro.generate, or infill.")
        weight_VD, present_BT = self._network().embedding.weight, tokens_present(batch.mask_BT)
        laws = mask_laws(batch, weight_VD)
        with sequence_plate(batch.size):
            with full_precision(batch.inputs_BT):
                z_BLKD = self.prior()
            share_B, order_BT = pyro.sample(SHARE, laws[SHARE]), pyro.sample(ORDER, laws[ORDER])
            pyro.sample(LENGTH, self.length_law(unscored(batch.mask_BT)), obs=present_BT.sum(-1) - 1)
            masked_BT, weight_B = choose_masked(share_B, order_BT, batch.mask_BT)
            tokens = self.tokens_given(batch.targets_BT, masked_BT, present_BT, weight_B)
            pyro.sample(TOKENS, tokens, obs=self.observed(batch))
        return z_BLKD

    def length_law(self, least_B: Int[Tensor, " B"]) -> Any:
        """p(n − 1) of each sequence, for n above a number of tokens that are there already."""
        logits_T = self.length_logits_T
        known_BT = torch.arange(len(logits_T), device=logits_T.device) < least_B[:, None]
        return dist.Categorical(logits=logits_T.masked_fill(known_BT, -torch.inf), validate_args=False)

    def tokens_given(
        self,
        tokens_BT: Int[Tensor, "B T"],
        masked_BT: Bool[Tensor, "*S B T"],
        present_BT: Bool[Tensor, "B T"],
        weight_B: Float[Tensor, "*S B"],
    ) -> TokenCategorical:
        """The law of the masked tokens given the others, each log-probability times the sequence's weight."""
        decoder, shape = self._network(), masked_BT.shape
        embedding_VD, flat = decoder.embedding.weight, (-1, shape[-1])
        late = LateGradient.of(embedding_VD, tuple(shape))
        stem_BTD = decoder.stem(tokens_BT.expand(shape).reshape(flat), masked_BT.reshape(flat))
        hidden_BTD = decoder(stem_BTD, None, present_BT.expand(shape).reshape(flat)).unflatten(0, shape[:-1])
        return TokenCategorical(hidden_BTD, embedding_VD, masked_BT * weight_B[..., None], late)

    def observation(self, z_BLKD: Any, batch: Batch) -> NoReturn:
        """There is no p(x | z): raises `UsageError`."""
        raise UsageError(f"There is no law of the tokens given thoughts: {self.only_bound}; ask for bound.")

    def observed(self, batch: Batch) -> Int[Tensor, "B T"] | None:
        """x, the tokens."""
        return batch.targets_BT

    def _network(self) -> Denoiser:
        decoder = cast(Denoiser, self._modules["decoder"])  # PyroModule.__getattr__ registers parameters: too slow
        return self.decoder if decoder.embedding.weight.requires_grad else decoder


def tokens_present(mask_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Every token up to the last scored one, as opposed to padding."""
    return mask_BT.flip(-1).cumsum(-1).flip(-1) > 0


def unscored(mask_BT: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """The number of tokens before the first scored one, such as those of a prompt."""
    return (mask_BT.cumsum(-1) == 0).sum(-1).minimum(tokens_present(mask_BT).sum(-1))
