"""The slow gradient over a trajectory: the decoder follows the average of what it saw on the way to q.

Shapes: B sequences, T tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.contracts import Guide, Model
from ltm_pyro.inference.learning_rates import slow_parameters


class TrajectoryGradient:
    """The global parameters' gradient averaged over a trajectory, with the stem's part sent back only once.

    The embedding's gradient comes from the head as a whole and from the stem in a few rows, which are added to it: held
    side by side they would be the largest tensors of a step.
    """

    def __init__(self, model: Model, guide: Guide, leaf_BTD: Tensor | None, stem_BTD: Tensor | None) -> None:
        self.parameters = [p for _, p in slow_parameters(model, guide) if p.requires_grad]
        self.tensors: list[Tensor] = [*self.parameters]
        self.stem: list[Tensor] = []
        if leaf_BTD is not None and stem_BTD is not None and stem_BTD.requires_grad:
            self.tensors.append(leaf_BTD.requires_grad_())
            self.stem.append(stem_BTD)
        self.sums: list[Tensor | None] = []
        self.count = 0

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One more point of the trajectory."""
        self.count += 1
        self.sums = (
            [_added(a, b) for a, b in zip(self.sums, gradients, strict=True)] if self.sums else _owned(gradients)
        )

    def loss(self, value: Tensor) -> Tensor:
        """``value``, whose backward, to be called once, gives every parameter the average gradient."""
        known = self.sums[: len(self.parameters)]
        if self.stem:
            through = torch.autograd.grad(self.stem, self.parameters, self.sums[-1:], allow_unused=True)
            known = [_added(a, b) for a, b in zip(known, through, strict=True)]
        self.sums = []
        seen = [(p, x) for p, x in zip(self.parameters, _owned(known), strict=True) if x is not None]
        return _WithGradient.apply(value, 1 / self.count, [x for _, x in seen], *(p for p, _ in seen))


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


def _owned(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each in dense memory of its own, to be changed in place: autograd may hand out one tensor twice, or expanded."""
    found: list[Tensor | None] = []
    taken: set[int] = set()
    for x in gradients:
        if x is not None:
            x = x.to_dense()
            if x.untyped_storage().data_ptr() in taken or not x.is_contiguous():
                x = x.clone(memory_format=torch.contiguous_format)
            taken.add(x.untyped_storage().data_ptr())
        found.append(x)
    return found


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``parameters`` is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: float, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.share, ctx.gradients = share, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, known = ctx.share * grad, [ctx.gradients.pop(0) for _ in range(len(ctx.gradients))]
        return None, None, None, *(x.mul_(factor) for x in known)  # in place: they are needed once
