"""Independent normals whose KL divergence is one autograd function: half the passes over memory that autograd needs."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Normal, register_kl


class Factorised(dist.Normal):
    """Normals of which the KL from other normals takes half the passes over memory that autograd needs."""


@register_kl(Factorised, Normal)  # type: ignore[untyped-decorator]
def kl_of_normals(q: Normal, p: Normal) -> Tensor:
    """(r² + d² − 1) / 2 − log r, with d = (μ_q − μ_p) / σ_p and r = σ_q / σ_p."""
    kl: Tensor = _NormalKL.apply(q.loc, q.scale, p.loc, p.scale)
    return kl


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
        d, r = (q_loc - p_loc).div_(p_scale), q_scale / p_scale
        ctx.save_for_backward(d, r, p_scale)
        return r.log().neg_().addcmul_(d, d, value=0.5).addcmul_(r, r, value=0.5).sub_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, r, p_scale = ctx.saved_tensors
        slope = grad / p_scale
        to_loc, to_scale = d * slope, (r - r.reciprocal()).mul_(slope)
        if not any(ctx.needs_input_grad[2:]):
            return to_loc, to_scale, None, None
        return to_loc, to_scale, -to_loc, (1 - d**2 - r**2).mul_(slope)
