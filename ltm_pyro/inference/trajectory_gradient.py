"""The slow gradient over a trajectory: the global parameters' gradient, averaged over all fast steps.

Shapes: B sequences, T tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.contracts import Guide, Model
from ltm_pyro.inference.learning_rates import slow_parameters


class TrajectoryGradient:
    """The global parameters' gradient, averaged over the q's of a trajectory; the stem's backward pass runs only once.

    The embedding's gradient has a dense part from the output layer and a sparse part from the stem. The sparse part is
    added to the dense one in place, because two dense gradients would be the largest tensors of a step.

    Args:
        leaf_BTD: the detached stem that the fast steps use.
        stem_BTD: the stem itself, with its autograd graph.
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
        """Adds the gradients of ``tensors`` at one q of the trajectory."""
        self.count += 1
        if self.sums:
            self.sums = [_add(total, x) for total, x in zip(self.sums, gradients, strict=True)]
        else:
            self.sums = _own_memory(gradients)

    def loss(self, value: Tensor) -> Tensor:
        """``value``, whose backward pass gives every parameter its average gradient; it can run only once."""
        sums = self.sums[: len(self.parameters)]
        if self.stem:
            through_stem = torch.autograd.grad(self.stem, self.parameters, self.sums[-1:], allow_unused=True)
            sums = [_add(total, x) for total, x in zip(sums, through_stem, strict=True)]
        self.sums = []
        used = [(p, x) for p, x in zip(self.parameters, _own_memory(sums), strict=True) if x is not None]
        return _WithGradient.apply(value, 1 / self.count, [x for _, x in used], *(p for p, _ in used))


def _add(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    if total is None or x is None:
        return x if total is None else total
    return total.add_(x)


def _own_memory(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, safe to change in place: autograd may return one tensor twice, an expanded or a sparse one."""
    copies: list[Tensor | None] = []
    storages: set[int] = set()
    for x in gradients:
        if x is not None:
            x = x.to_dense()
            if x.untyped_storage().data_ptr() in storages or not x.is_contiguous():
                x = x.clone(memory_format=torch.contiguous_format)
            storages.add(x.untyped_storage().data_ptr())
        copies.append(x)
    return copies


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``parameters`` is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, gradients = ctx.factor * grad, [ctx.gradients.pop(0) for _ in range(len(ctx.gradients))]
        return None, None, None, *(x.mul_(factor) for x in gradients)  # in place, because each is used once
