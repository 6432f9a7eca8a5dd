"""Projection to the vocabulary fused with the cross-entropy: the logits of a whole batch are never in memory.

Shapes: B sequences, T tokens, N = B T flattened (times particles), D width, V vocabulary.
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
    r"""The cross-entropy of every token, in nats, under a categorical with logits E h.

    .. math:: -\log p(x_t) = \log \sum_v \exp (E h_t)_v - (E h_t)_{x_t}

    Matrix products use autocast's type, sums and exponentials at least float32. The gradient with respect to
    ``hidden_BTD`` is computed in the forward pass (4 V D FLOPs per token in total). If E needs a gradient too, its
    backward pass computes the logits a second time (8 V D).

    Args:
        late: the part for E's gradient, created before the decoder runs, which saves memory.

    Raises:
        UsageError: if a second derivative is requested; `TokenCategorical.logits` has one.
    """
    shape = hidden_BTD.shape[:-1]
    hidden_ND, value_N = hidden_BTD.flatten(0, -2), value_BT.expand(shape).flatten()
    dtype, needs_gradient = matrix_dtype(hidden_ND), torch.is_grad_enabled() and hidden_BTD.requires_grad
    if late is None or late.inputs or late.nats_BT.shape != shape:
        late = LateGradient.of(embedding_VD, shape)
    nats_N, lse_N = NatsFunction.apply(hidden_ND, embedding_VD.detach(), value_N, dtype, needs_gradient)
    nats_BT: Tensor = nats_N.view(shape)
    return nats_BT if late is None else nats_BT + late.receive(hidden_ND.to(dtype), value_N, lse_N)


class LateGradient:
    """A zero tensor, added to the nats, whose backward pass computes the gradient of the embedding E.

    Autograd runs the backward passes in reverse order of the calls. This tensor is created before the decoder runs, so
    that E's gradient, the largest tensor of a step, is computed after the decoder's activations are freed. It serves
    one call of `token_nats`.

    Args:
        shape: (..., B, T), the shape of the nats.
    """

    def __init__(self, embedding_VD: Float[Tensor, "V D"], shape: tuple[int, ...]) -> None:
        self.inputs: list[Tensor] = []  # hidden states, tokens and log Σ exp, which `token_nats` gives
        self.nats_BT: Tensor = EmbeddingGradient.apply(embedding_VD, self.inputs, shape)

    @classmethod
    def of(cls, embedding_VD: Float[Tensor, "V D"], shape: tuple[int, ...]) -> "LateGradient | None":
        """A new `LateGradient`, or None if E needs no gradient."""
        return cls(embedding_VD, shape) if torch.is_grad_enabled() and embedding_VD.requires_grad else None

    def receive(self, *inputs: Tensor) -> Float[Tensor, "... B T"]:
        """Stores hidden states, tokens and log Σ exp for the backward pass, and returns the zero tensor."""
        self.inputs += [x.detach() for x in inputs]
        return self.nats_BT
