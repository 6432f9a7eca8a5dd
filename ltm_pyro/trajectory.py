"""The slow gradient over a trajectory: the decoder follows the average of what it saw on the way to q.

Shapes: B sequences, T tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.contracts import Model


class AverageGradient:
    """The global parameters' gradient averaged over a trajectory, with the stem's part sent back only once."""

    def __init__(self, model: Model, leaf_BTD: Tensor | None, stem_BTD: Tensor | None) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stem = [] if stem_BTD is None else [stem_BTD]
        self.tensors = self.parameters + ([] if leaf_BTD is None else [leaf_BTD.requires_grad_()])
        self.sums = [torch.zeros_like(x) for x in self.tensors]
        self.count = 0

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One more point of the trajectory."""
        self.count += 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def loss(self, value: Tensor) -> Tensor:
        """``value``, whose backward gives every parameter the average gradient."""
        known = self.sums[: len(self.parameters)]
        if self.stem:
            through = torch.autograd.grad(self.stem, self.parameters, self.sums[-1:], allow_unused=True)
            known = [a if b is None else a + b for a, b in zip(known, through, strict=True)]
        return _WithGradient.apply(value, [x / self.count for x in known], *self.parameters)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``parameters`` is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * x for x in ctx.gradients)
