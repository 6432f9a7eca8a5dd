"""Projection to the vocabulary and cross-entropy in one: the logits of a batch never exist together.

Shapes: B sequences, T tokens, N tokens of a batch in a row (particles folded in), D width, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ltm_pyro.nn.cross_entropy_autograd import EmbeddingGradient, NatsFunction
from ltm_pyro.nn.precision import matrix_dtype


def token_nats(
    hidden_BTD: Float[Tensor, "... B T D"],
    embedding_VD: Float[Tensor, "V D"],
    value_BT: Int[Tensor, "... B T"],
    late: "LateGradient | None" = None,
) -> Float[Tensor, "... B T"]:
    r"""Nats of every token under a categorical with logits E h.

    .. math:: -\log p(x_t) = \log \sum_v \exp (E h_t)_v - (E h_t)_{x_t}

    Products are computed as autocast says, sums and exponentials in at least float32. The gradient of ``hidden_BTD`` is
    computed in the same pass (4 V D FLOPs per token in all); if E needs one too, its backward pass computes the logits
    once more (8 V D).

    Args:
        late: created before the decoder ran, which saves memory.

    Raises:
        UsageError: when a second derivative is asked for; `TokenCategorical.logits` has one.
    """
    shape = hidden_BTD.shape[:-1]
    hidden_ND, value_N = hidden_BTD.flatten(0, -2), value_BT.expand(shape).flatten()
    dtype, needs_gradient = matrix_dtype(hidden_ND), torch.is_grad_enabled() and hidden_BTD.requires_grad
    if late is None or late.seen or late.nats_BT.shape != shape:
        late = LateGradient.of(embedding_VD, shape)
    nats_N, lse_N = NatsFunction.apply(hidden_ND, embedding_VD.detach(), value_N, dtype, needs_gradient)
    nats_BT: Tensor = nats_N.view(shape)
    return nats_BT if late is None else nats_BT + late.take(hidden_ND.to(dtype), value_N, lse_N)


class LateGradient:
    """E's part in `token_nats`: a zero tensor whose backward pass is E's gradient.

    Autograd goes backward first through what was called last. This part is created before the decoder runs, so that E's
    gradient, the largest tensor of a step, is computed when the decoder's activations are freed. Good for one call.

    Args:
        shape: of the tokens to come, (..., B, T).
    """

    def __init__(self, embedding_VD: Float[Tensor, "V D"], shape: tuple[int, ...]) -> None:
        self.seen: list[Tensor] = []  # hidden states, tokens and log Σ exp, from the head
        self.nats_BT: Tensor = EmbeddingGradient.apply(embedding_VD, self.seen, shape)

    @classmethod
    def of(cls, embedding_VD: Float[Tensor, "V D"], shape: tuple[int, ...]) -> "LateGradient | None":
        """None if E does not learn."""
        return cls(embedding_VD, shape) if torch.is_grad_enabled() and embedding_VD.requires_grad else None

    def take(self, *seen: Tensor) -> Float[Tensor, "... B T"]:
        """The zero tensor, for the tokens that the head has seen."""
        self.seen += [x.detach() for x in seen]
        return self.nats_BT
