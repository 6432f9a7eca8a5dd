"""The autograd functions behind `ltm_pyro.nn.cross_entropy`: forward and backward tile by tile.

Shapes: N tokens of a batch, flattened (times particles), D width, V vocabulary, R × U one tile of logits.
"""

from collections.abc import Callable, Iterator
from functools import cache
from inspect import unwrap
from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.errors import UsageError
from ltm_pyro.nn.precision import full_precision
from ltm_pyro.utils.malloc import make_room


class Tile(NamedTuple):
    """Size of a tile of logits: tokens, vocabulary entries, and the multiple that the entries are padded to."""

    rows: int
    columns: int
    multiple: int = 1


TILES = {"cpu": Tile(1024, 1024)}  # this many float32 values fit in a core's cache
LARGE_TILE = Tile(8192, 65_536, 64)  # on an accelerator: few, large and aligned kernels; 1 GB


class NatsFunction(torch.autograd.Function):
    """(hidden states) → (nats, log Σ exp), differentiable in the nats."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, embedding_VD: Tensor, value_N: Tensor, dtype: torch.dtype, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Nats and log Σ exp of every token; the gradient is computed in the same pass."""
        lse_N, mean_ND, logit_N = _logsumexp_and_mean(hidden_ND.to(dtype), embedding_VD, needs_gradient, value_N)
        nats_and_gradient = kernel(_nats_and_gradient, hidden_ND.device.type)
        nats_N, gradient_ND = nats_and_gradient(lse_N, mean_ND, hidden_ND.detach(), embedding_VD[value_N], logit_N)
        if needs_gradient:
            ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(lse_N)
        return nats_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the hidden states, which `forward` has computed."""
        _refuse_second_derivative()
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_N[:, None].to(gradient_ND.dtype), None, None, None, None


class EmbeddingGradient(torch.autograd.Function):
    """E → zeros, whose backward pass computes the gradient of the nats with respect to E."""

    @staticmethod
    def forward(ctx: Any, embedding_VD: Tensor, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Zeros."""
        ctx.save_for_backward(embedding_VD)
        ctx.inputs = inputs
        return embedding_VD.new_zeros(shape, dtype=torch.promote_types(embedding_VD.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to E, from logits that are computed a second time."""
        _refuse_second_derivative()
        (embedding_VD,), (hidden_ND, value_N, lse_N) = ctx.saved_tensors, ctx.inputs
        with full_precision(grad_BT):
            gradient_VD = _embedding_gradient(hidden_ND, embedding_VD, value_N, lse_N, grad_BT.flatten())
            return gradient_VD.to(embedding_VD.dtype), None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise UsageError("The fused cross-entropy has no second derivative: use `TokenCategorical.logits`.")


def _nats_and_gradient(
    lse_N: Tensor, mean_ND: Tensor, hidden_ND: Tensor, target_ND: Tensor, logit_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The nats of tokens whose rows of E are ``target_ND``, and their gradient with respect to the hidden states.

    ``logit_N`` is given in half precision: it is rounded as those in the sum are, or a confident token would have less
    than 0 nats.
    """
    wide_ND = target_ND.to(lse_N.dtype)
    logit_N = (hidden_ND.to(lse_N.dtype) * wide_ND).sum(-1) if logit_N is None else logit_N
    return lse_N - logit_N, (mean_ND - wide_ND).to(hidden_ND.dtype)


def _tile(x: Tensor) -> Tile:
    return TILES.get(x.device.type, LARGE_TILE)


def _rows(hidden_ND: Tensor) -> Iterator[slice]:
    size = _tile(hidden_ND).rows
    return (slice(first, first + size) for first in range(0, len(hidden_ND), size))


def _columns(embedding_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of E and their tensors; on an accelerator padded with rows of zeros."""
    _, size, multiple = _tile(embedding_VD)
    for first in range(0, len(embedding_VD), size):
        columns = slice(first, min(first + size, len(embedding_VD)))
        part_UD = embedding_VD[columns].to(dtype)
        padding = -len(part_UD) % multiple
        yield columns, F.pad(part_UD, (0, 0, 0, padding)) if padding else part_UD


def _logsumexp_and_mean(
    hidden_ND: Tensor, embedding_VD: Tensor, needs_gradient: bool, value_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log Σ exp (E h)_v, and if ``needs_gradient`` the mean of E's rows under softmax(E h), with an online softmax.

    In half precision also the logits of ``value_N``, from the same products.
    """
    dtype = hidden_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    max_N1 = hidden_ND.new_full((len(hidden_ND), 1), -torch.inf, dtype=wide)
    total_N1, mean_ND = torch.zeros_like(max_N1), torch.zeros_like(hidden_ND, dtype=wide)
    columns_each = _tile(embedding_VD).columns
    chosen_N1: list[Tensor] = []  # by column of tiles; right for the tokens that are in it
    update, buffer_RU = kernel(_online_softmax, hidden_ND.device.type), _tile_buffer(hidden_ND, wide)
    for columns, part_UD in _columns(embedding_VD, dtype):
        size = columns.stop - columns.start
        if dtype != wide:
            place_N1 = (value_N % columns_each).clamp(max=size - 1)[:, None]
            chosen_N1.append(torch.empty_like(max_N1, dtype=dtype))
        for rows in _rows(hidden_ND):
            logits_RU = hidden_ND[rows] @ part_UD.T
            if dtype != wide:
                torch.gather(logits_RU, 1, place_N1[rows], out=chosen_N1[-1][rows])
            tile = logits_RU, size, max_N1[rows], total_N1[rows], buffer_RU
            max_N1[rows], total_N1[rows], factor_R1, weights_RU = update(*tile)
            if needs_gradient:
                mean_ND[rows].mul_(factor_R1).add_(weights_RU @ part_UD)
            del tile, logits_RU, weights_RU  # so that the next tile can reuse their memory
    own_1N = torch.div(value_N, columns_each, rounding_mode="floor")[None]
    logit_N = torch.cat(chosen_N1, 1).T.gather(0, own_1N)[0].to(wide) if chosen_N1 else None
    return (max_N1 + total_N1.log())[:, 0], mean_ND.div_(total_N1), logit_N


def _tile_buffer(hidden_ND: Tensor, wide: torch.dtype) -> Tensor | None:
    """A buffer for one tile in full precision, because on a CPU to allocate it costs more than to compute the tile."""
    tile = TILES.get(hidden_ND.device.type)
    return None if tile is None or hidden_ND.dtype == wide else hidden_ND.new_empty(tile[:2], dtype=wide)


@no_type_check  # no shape check at run time, because torch.compile would compile it into the caller
def _to_wide(logits_RU: Tensor, wide: torch.dtype, buffer_RU: Tensor | None) -> Tensor:
    if buffer_RU is None:
        return logits_RU.to(wide)
    return buffer_RU[: len(logits_RU), : logits_RU.shape[1]].copy_(logits_RU)


def _online_softmax(
    logits_RU: Tensor, size: int, max_R1: Tensor, total_R1: Tensor, buffer_RU: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds a tile: the largest logit m so far, Σ exp (l − m), the factor on earlier sums, and exp (l − m).

    The columns after the first ``size`` ones are padding.
    """
    wide_RU = _to_wide(logits_RU, max_R1.dtype, buffer_RU)
    if size < logits_RU.shape[1]:
        wide_RU[:, size:] = -torch.inf
    new_max_R1 = torch.maximum(max_R1, wide_RU.amax(1, keepdim=True))
    factor_R1 = (max_R1 - new_max_R1).exp()
    weights_RU = wide_RU.sub_(new_max_R1).exp_()
    total_R1 = torch.addcmul(weights_RU.sum(1, keepdim=True), total_R1, factor_R1)
    return new_max_R1, total_R1, factor_R1, logits_RU.copy_(weights_RU)


def _logits_gradient(logits_RU: Tensor, lse_R1: Tensor, grad_R1: Tensor, buffer_RU: Tensor | None) -> Tensor:
    """softmax(logits) · grad, in the memory of the logits."""
    return logits_RU.copy_(_to_wide(logits_RU, lse_R1.dtype, buffer_RU).sub_(lse_R1).exp_().mul_(grad_R1))


@cache
def kernel(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function compiled into one kernel; unchanged on a CPU, where a tile stays in cache.

    Shapes are static, because a kernel for dynamic shapes cannot assume alignment.
    """
    return function if device == "cpu" else torch.compile(unwrap(function))  # without its shape check


def _embedding_gradient(
    hidden_ND: Tensor, embedding_VD: Tensor, value_N: Tensor, lse_N: Tensor, grad_N: Tensor
) -> Float[Tensor, "V D"]:
    """Σ_n (softmax(E h_n) − one-hot(x_n)) · ``grad_N`` · h_nᵀ; sums in the type of ``lse_N``."""
    make_room(embedding_VD.numel() * lse_N.element_size())
    gradient_VD = torch.zeros_like(embedding_VD, dtype=lse_N.dtype)
    to_gradient, buffer_RU = kernel(_logits_gradient, hidden_ND.device.type), _tile_buffer(hidden_ND, lse_N.dtype)
    for columns, part_UD in _columns(embedding_VD, hidden_ND.dtype):
        for rows in _rows(hidden_ND):
            grad_RU = to_gradient(hidden_ND[rows] @ part_UD.T, lse_N[rows, None], grad_N[rows, None], buffer_RU)
            gradient_VD[columns] += (grad_RU.T @ hidden_ND[rows])[: columns.stop - columns.start]
    return gradient_VD.index_add_(0, value_N, (hidden_ND * -grad_N[:, None]).to(gradient_VD.dtype))
