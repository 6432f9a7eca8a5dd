"""The autograd functions behind `ltm_pyro.nn.cross_entropy`: forward and backward tile by tile.

Shapes: N tokens of a batch in a row (particles folded in), D width, V vocabulary, R × U one tile of logits.
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
    """How many tokens and vocabulary entries a tile has, and to a multiple of how many entries it is padded."""

    rows: int
    columns: int
    multiple: int = 1


TILES = {"cpu": Tile(1024, 1024)}  # so many float32 stay in a core's cache
LARGE_TILE = Tile(8192, 65_536, 64)  # of an accelerator: few, large and aligned kernels on whole rows; 1 GB


class NatsFunction(torch.autograd.Function):
    """The nats as a function of the hidden states, and log Σ exp."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, embedding_VD: Tensor, value_N: Tensor, dtype: torch.dtype, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Nats and log Σ exp of every token; the gradient is computed in the same pass."""
        lse_N, mean_ND = _expect(hidden_ND.to(dtype), embedding_VD, needs_gradient)
        compared = kernel(_compared, hidden_ND.device.type)
        nats_N, slope_ND = compared(lse_N, mean_ND, hidden_ND.detach(), embedding_VD[value_N])
        if needs_gradient:
            ctx.save_for_backward(slope_ND)
        ctx.mark_non_differentiable(lse_N)
        return nats_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the hidden states, which `forward` has computed."""
        _refuse_second_derivative()
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grad_N[:, None].to(slope_ND.dtype), None, None, None, None


class EmbeddingGradient(torch.autograd.Function):
    """Zeros as a function of E, with the gradient that the nats have."""

    @staticmethod
    def forward(ctx: Any, embedding_VD: Tensor, seen: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Zeros."""
        ctx.save_for_backward(embedding_VD)
        ctx.seen = seen
        return embedding_VD.new_zeros(shape, dtype=torch.promote_types(embedding_VD.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of E, from the logits computed once more."""
        _refuse_second_derivative()
        (embedding_VD,), (hidden_ND, value_N, lse_N) = ctx.saved_tensors, ctx.seen
        with full_precision(grad_BT):
            found_VD = _embedding_gradient(hidden_ND, embedding_VD, value_N, lse_N, grad_BT.flatten())
            return found_VD.to(embedding_VD.dtype), None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph
        raise UsageError("The fused cross-entropy has no second derivative: go through `TokenCategorical.logits`.")


def _compared(lse_N: Tensor, mean_ND: Tensor, hidden_ND: Tensor, own_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The nats of tokens whose rows of E are ``own_ND``, and their slope along the hidden states."""
    wide_ND = own_ND.to(lse_N.dtype)
    return lse_N - (hidden_ND.to(lse_N.dtype) * wide_ND).sum(-1), (mean_ND - wide_ND).to(hidden_ND.dtype)


def _tile(x: Tensor) -> Tile:
    return TILES.get(x.device.type, LARGE_TILE)


def _rows(hidden_ND: Tensor) -> Iterator[slice]:
    size = _tile(hidden_ND).rows
    return (slice(first, first + size) for first in range(0, len(hidden_ND), size))


def _columns(embedding_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts of E with their place; on an accelerator padded by rows of zeros."""
    _, size, multiple = _tile(embedding_VD)
    for left in range(0, len(embedding_VD), size):
        place = slice(left, min(left + size, len(embedding_VD)))
        part_UD = embedding_VD[place].to(dtype)
        missing = -len(part_UD) % multiple
        yield place, F.pad(part_UD, (0, 0, 0, missing)) if missing else part_UD


def _expect(hidden_ND: Tensor, embedding_VD: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """log Σ exp (E h)_v, and if ``needs_gradient`` the mean of E's rows under softmax(E h), as in flash attention."""
    dtype = hidden_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    top_N1 = hidden_ND.new_full((len(hidden_ND), 1), -torch.inf, dtype=wide)
    total_N1, mean_ND = torch.zeros_like(top_N1), torch.zeros_like(hidden_ND, dtype=wide)
    absorb, room_RU = kernel(_absorb, hidden_ND.device.type), _room(hidden_ND, wide)
    for place, part_UD in _columns(embedding_VD, dtype):
        for rows in _rows(hidden_ND):
            tile = hidden_ND[rows] @ part_UD.T, place.stop - place.start, top_N1[rows], total_N1[rows], room_RU
            top_N1[rows], total_N1[rows], shrunk_R1, weights_RU = absorb(*tile)
            if needs_gradient:
                mean_ND[rows].mul_(shrunk_R1).add_(weights_RU @ part_UD)
            del tile, weights_RU  # the next tile may take their memory
    return (top_N1 + total_N1.log())[:, 0], mean_ND.div_(total_N1)


def _room(hidden_ND: Tensor, wide: torch.dtype) -> Tensor | None:
    """A buffer for one tile in full precision: on a CPU fresh memory costs more than the work done in it."""
    tile = TILES.get(hidden_ND.device.type)
    return None if tile is None or hidden_ND.dtype == wide else hidden_ND.new_empty(tile[:2], dtype=wide)


@no_type_check  # of shapes, at run time: torch would compile the check into whoever calls this
def _exact(logits_RU: Tensor, wide: torch.dtype, room_RU: Tensor | None) -> Tensor:
    if room_RU is None:
        return logits_RU.to(wide)
    return room_RU[: len(logits_RU), : logits_RU.shape[1]].copy_(logits_RU)


def _absorb(
    logits_RU: Tensor, real: int, top_R1: Tensor, total_R1: Tensor, room_RU: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tile more: the largest logit m so far, Σ exp (l − m), the factor on earlier sums, and exp (l − m).

    The columns after the first ``real`` ones are padding.
    """
    exact_RU = _exact(logits_RU, top_R1.dtype, room_RU)
    if real < logits_RU.shape[1]:
        exact_RU[:, real:] = -torch.inf
    new_R1 = torch.maximum(top_R1, exact_RU.amax(1, keepdim=True))
    shrunk_R1 = (top_R1 - new_R1).exp()
    weights_RU = exact_RU.sub_(new_R1).exp_()
    total_R1 = torch.addcmul(weights_RU.sum(1, keepdim=True), total_R1, shrunk_R1)
    return new_R1, total_R1, shrunk_R1, logits_RU.copy_(weights_RU)


def _slopes(logits_RU: Tensor, lse_R1: Tensor, grad_R1: Tensor, room_RU: Tensor | None) -> Tensor:
    """softmax · grad."""
    return logits_RU.copy_(_exact(logits_RU, lse_R1.dtype, room_RU).sub_(lse_R1).exp_().mul_(grad_R1))


@cache
def kernel(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function compiled into one kernel; on a CPU, where a tile stays in cache, as it is.

    Shapes are static, because a kernel for dynamic shapes cannot assume alignment.
    """
    return function if device == "cpu" else torch.compile(unwrap(function))  # not what checks its shapes


def _embedding_gradient(
    hidden_ND: Tensor, embedding_VD: Tensor, value_N: Tensor, lse_N: Tensor, grad_N: Tensor
) -> Float[Tensor, "V D"]:
    """Σ_n (softmax(E h_n) − one-hot(x_n)) · ``grad_N`` · h_nᵀ; sums in the type of ``lse_N``."""
    make_room(embedding_VD.numel() * lse_N.element_size())
    found_VD = torch.zeros_like(embedding_VD, dtype=lse_N.dtype)
    slopes, room_RU = kernel(_slopes, hidden_ND.device.type), _room(hidden_ND, lse_N.dtype)
    for place, part_UD in _columns(embedding_VD, hidden_ND.dtype):
        for rows in _rows(hidden_ND):
            to_logits_RU = slopes(hidden_ND[rows] @ part_UD.T, lse_N[rows, None], grad_N[rows, None], room_RU)
            found_VD[place] += (to_logits_RU.T @ hidden_ND[rows])[: place.stop - place.start]
    return found_VD.index_add_(0, value_N, (hidden_ND * -grad_N[:, None]).to(found_VD.dtype))
