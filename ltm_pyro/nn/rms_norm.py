"""Root-mean-square normalisation with a hand-written backward pass. Shapes: B sequences, D width."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.nn.precision import matrix_dtype


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) ⊙ w, computed in at least float32 (arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normalised input, in the dtype of the matrix product that follows."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return rms_norm(x_BTD, self.weight).to(matrix_dtype(x_BTD))
        out: Tensor = _RMSNormFunction.apply(x_BTD, self.weight, matrix_dtype(x_BTD))
        return out


def rms_norm(x_BTD: Float[Tensor, "*B D"], weight_D: Float[Tensor, " D"]) -> Float[Tensor, "*B D"]:
    """The formula of `RMSNorm`."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    return F.rms_norm(x_BTD.to(wide), weight_D.shape, weight_D.to(wide), torch.finfo(wide).eps)


class _RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with half as many passes over memory as autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square() / x.shape[-1]).add_(torch.finfo(wide.dtype).eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).mul_(weight_D).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: use autograd, which can be differentiated again
            wanted = [x for x, need in zip((x, weight_D), ctx.needs_input_grad, strict=False) if need]
            gradients = iter(torch.autograd.grad(rms_norm(x, weight_D).to(grad.dtype), wanted, grad, create_graph=True))
            return *(next(gradients) if need else None for need in ctx.needs_input_grad[:2]), None
        grad_normalised, grad_weight = grad * weight_D, None
        dot = (grad_normalised * x).sum(-1, keepdim=True)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x * scale).flatten(0, -2).sum(0).to(weight_D.dtype)
        grad_x = grad_normalised.mul_(scale).addcmul_(x, dot * scale**3, value=-1 / x.shape[-1])
        return grad_x.to(x.dtype), grad_weight, None
