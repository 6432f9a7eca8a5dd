"""The distribution of the observed tokens: one categorical per token."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.nn.cross_entropy import LateGradient, token_nats


class TokenCategorical(TorchDistribution):
    r"""A sequence of tokens given the decoder's hidden states.

    .. math:: \log p(x) = \sum_t m_t \, [(E h_t)_{x_t} - \log \sum_v \exp (E h_t)_v]

    `sample` draws every token given these hidden states, that is, given the true tokens before it. Generated text is
    not fed back to the decoder.

    Args:
        hidden_BTD: the decoder's output; it may have leading particle axes.
        embedding_VD: E, the embedding, tied to the output layer.
        mask_BT: m, False at padding; or weights of the tokens.
        late: the part for E's gradient, created before the decoder runs, which saves memory if E needs a gradient.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        hidden_BTD: Float[Tensor, "... B T D"],
        embedding_VD: Float[Tensor, "V D"],
        mask_BT: Bool[Tensor, "B T"] | Float[Tensor, "... B T"],
        late: LateGradient | None = None,
    ) -> None:
        self.hidden_BTD, self.embedding_VD, self.mask_BT, self.late = hidden_BTD, embedding_VD, mask_BT, late
        super().__init__(hidden_BTD.shape[:-2], hidden_BTD.shape[-2:-1], validate_args=False)

    @property
    def logits(self) -> Float[Tensor, "... B T V"]:
        """E h, the unnormalised log-probabilities."""
        return F.linear(self.hidden_BTD, self.embedding_VD)

    def log_prob(self, value: Int[Tensor, "... B T"]) -> Float[Tensor, "... B"]:
        """log p(x) of each sequence in nats, without padding."""
        nats_BT = token_nats(self.hidden_BTD, self.embedding_VD, value, self.late)
        return -(nats_BT * self.mask_BT).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Int[Tensor, "... B T"]:
        """Draws every token independently, given the hidden states."""
        return torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TokenCategorical":
        """The same distribution with more leading axes; itself if it already has them, as in every Pyro plate."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        hidden_BTD = self.hidden_BTD.expand(*batch_shape, *self.hidden_BTD.shape[-2:])
        return TokenCategorical(hidden_BTD, self.embedding_VD, self.mask_BT, self.late)
