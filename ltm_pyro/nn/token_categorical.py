"""The distribution of the observed site: one categorical per token, never normalised twice."""

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

    Sampling draws every token given the hidden states as they are, that is, given the inputs the decoder has read.

    Args:
        hidden_BTD: the decoder's output; leading particle axes are free.
        embedding_VD: E, the tied embedding.
        mask_BT: m, False at padding.
        late: made before the decoder ran, which saves memory where E learns.
    """

    arg_constraints = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        hidden_BTD: Float[Tensor, "... B T D"],
        embedding_VD: Float[Tensor, "V D"],
        mask_BT: Bool[Tensor, "B T"],
        late: LateGradient | None = None,
    ) -> None:
        self.hidden_BTD, self.embedding_VD, self.mask_BT, self.late = hidden_BTD, embedding_VD, mask_BT, late
        super().__init__(hidden_BTD.shape[:-2], hidden_BTD.shape[-2:-1], validate_args=False)

    @property
    def logits(self) -> Float[Tensor, "... B T V"]:
        """Unnormalised log-probabilities."""
        return F.linear(self.hidden_BTD, self.embedding_VD)

    def log_prob(self, value: Int[Tensor, "... B T"]) -> Float[Tensor, "... B"]:
        """Log-probability of each sequence in nats, padding excluded."""
        nats_BT = token_nats(self.hidden_BTD, self.embedding_VD, value, self.late)
        return -(nats_BT * self.mask_BT).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Int[Tensor, "... B T"]:
        """Every token drawn given the inputs the decoder has read."""
        return torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TokenCategorical":
        """The same distribution with more leading axes; itself where it has them, as in every plate of Pyro's."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        hidden_BTD = self.hidden_BTD.expand(*batch_shape, *self.hidden_BTD.shape[-2:])
        return TokenCategorical(hidden_BTD, self.embedding_VD, self.mask_BT, self.late)
