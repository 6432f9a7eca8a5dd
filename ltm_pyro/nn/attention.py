"""Attention: causal self-attention over a window of W tokens or full self-attention, and attention to thoughts.

Shapes: B sequences (times particles), H query heads, G key and value heads, T tokens, U new tokens, K thoughts,
W window, C channels of a head.
"""

import logging
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.threads import one_at_a_time


class KeysValues(NamedTuple):
    """The keys and values that queries attend to."""

    keys_BGMC: Float[Tensor, "B G M C"]
    values_BGMC: Float[Tensor, "B G M C"]

    def select(self, index_b: Int[Tensor, " b"]) -> "KeysValues":
        """The sequences at the given indices."""
        return KeysValues(*(x[index_b] for x in self))

    def repeat_heads(self, heads: int) -> "KeysValues":
        """Keys and values repeated for ``heads`` query heads; each group of neighbouring heads has the same ones."""
        repeats = heads // self.keys_BGMC.shape[1]
        return self if repeats == 1 else KeysValues(*(x.repeat_interleave(repeats, 1) for x in self))


class ThoughtKV(NamedTuple):
    """Keys and projected values of one layer's thoughts, M = H · K.

    The output projection is a sum over heads, W_o [Σ_k w_hk v_hk]_h = Σ_hk w_hk (W_o^h v_hk), so that it is applied to
    the values of K thoughts once, instead of to every token.
    """

    keys_BHKC: Float[Tensor, "B H K C"]
    values_BMD: Float[Tensor, "B M D"]

    def select(self, index_b: Int[Tensor, " b"]) -> "ThoughtKV":
        """The sequences at the given indices."""
        return ThoughtKV(*(x[index_b] for x in self))


def window_mask(queries: int, keys: int, window: int, device: torch.device | None = None) -> Bool[Tensor, "Q M"]:
    """True where query i attends to key j: 0 ≤ i + (keys − queries) − j < window. The last query is at the last key."""
    i_Q1 = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance_QM = i_Q1 - torch.arange(keys, device=device)
    return (distance_QM >= 0) & (distance_QM < window)


def dense_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v over the last ``window`` tokens, itself included, in O(T²): the reference."""
    length = q_BHTC.shape[-2]
    mask_TT = window_mask(length, length, window, q_BHTC.device)
    return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=mask_TT)


def block_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """The same as `dense_attention`, in O(2 T W): a block of W queries attends to its own and the previous block."""
    length = q_BHTC.shape[2]
    if length <= window:
        return attend(q_BHTC, k_BHTC, v_BHTC, window_mask(length, length, window, q_BHTC.device))
    blocks = -(-length // window)
    q, k, v = (
        F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)) for x in (q_BHTC, k_BHTC, v_BHTC)
    )
    mask_bWM = window_mask(window, 2 * window, window, q.device).repeat(blocks, 1, 1)
    mask_bWM[0, :, :window] = False  # the first block has no previous block
    out_BHbWC = attend(q, _with_previous_block(k), _with_previous_block(v), mask_bWM)
    return out_BHbWC.flatten(2, 3)[:, :, :length]


def _with_previous_block(x_BHbWC: Tensor) -> Tensor:
    previous = F.pad(x_BHbWC, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat([previous, x_BHbWC], dim=3)


def xformers_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """The same as `dense_attention`, with xformers' memory-efficient kernels (CUDA, half precision)."""
    import xformers
    from xformers.ops import fmha, memory_efficient_attention

    if not xformers._has_cpp_library:
        raise ImportError(
            "xformers' compiled part does not load with this torch: see docs/speed.md for its requirements"
        )
    bias = fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window)
    q, k, v = (x.transpose(1, 2) for x in (q_BHTC, k_BHTC, v_BHTC))  # xformers expects (B, T, H, C)
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


def flex_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """The same as `dense_attention`, with a kernel that torch compiles for the window (CUDA)."""
    return _flex()(q_BHTC, k_BHTC, v_BHTC, block_mask=_flex_mask(q_BHTC.shape[2], window, str(q_BHTC.device)))


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=16)
def _flex_mask(length: int, window: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    return create_block_mask(in_window, None, None, length, length, device=device)


def full_attention(
    q_BHTC: Float[Tensor, "B H T C"],
    k_BHTC: Float[Tensor, "B H T C"],
    v_BHTC: Float[Tensor, "B H T C"],
    visible_BT: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v over all visible tokens of the sequence, before and behind; each has at least one."""
    return attend(q_BHTC, k_BHTC, v_BHTC, None if visible_BT is None else visible_BT[:, None, None])


BACKENDS = {  # fastest first
    "xformers": xformers_attention,
    "flex": flex_attention,
    "sdpa": block_attention,  # torch's scaled_dot_product_attention, block by block
    "dense": dense_attention,
}


def window_attention(
    q_BHTC: Float[Tensor, "B H T C"],
    k_BHTC: Float[Tensor, "B H T C"],
    v_BHTC: Float[Tensor, "B H T C"],
    window: int,
    attention: str = "auto",
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v over the last ``window`` tokens, itself included, with one of the `BACKENDS`."""
    chosen = _constant_backend(attention, q_BHTC.device.type, q_BHTC.dtype, q_BHTC.shape[-1], window)
    return BACKENDS[chosen](q_BHTC, k_BHTC, v_BHTC, window)


def _constant_backend(attention: str, device: str, dtype: torch.dtype, channels: int, window: int) -> str:
    return backend(attention, device, dtype, channels, window)


# what torch.compiler.assume_constant_result sets; that function imports torch.compile, which takes seconds
_constant_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def backend(attention: str, device: str, dtype: torch.dtype, channels: int, window: int) -> str:
    """The name of the backend to use; ``auto`` takes the first whose output and gradients are correct on this device.

    Raises:
        UsageError: if a backend given by name cannot be used.
    """
    if attention != "auto":
        if problem := _why_unusable(attention, device, dtype, channels, window):
            raise UsageError(
                f"Attention '{attention}' cannot run on {device} in {dtype} with {channels} channels a head and a "
                f"window of {window} ({problem}): set `attention` to auto."
            )
        return attention
    candidates = ("sdpa",) if device == "cpu" else tuple(BACKENDS)
    chosen = next((x for x in candidates if not _why_unusable(x, device, dtype, channels, window)), "dense")
    logging.getLogger(__name__).info("attention on %s in %s with a window of %d: %s", device, dtype, window, chosen)
    return chosen


def _why_unusable(name: str, device: str, dtype: torch.dtype, channels: int, window: int) -> str:
    """Why a backend cannot be used: its exception, or its error against `dense_attention`; empty if it can be used."""
    if name not in BACKENDS:
        return f"there is none of this name, only {', '.join(BACKENDS)}"
    length = min(2 * window, 512)
    outside = _disable_current_modes()  # a mode of the caller's would take this noise for a guide's (`RowNoiseMode`)
    with one_at_a_time, outside, torch.random.fork_rng(), torch.enable_grad(), torch.autocast(device, enabled=False):
        qkv = [torch.randn(1, 2, length, channels, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        try:
            results, expected = (_output_and_gradients(BACKENDS[x], qkv, window) for x in (name, "dense"))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True))
    tolerance = max(0.05, window * torch.finfo(dtype).eps)
    return "" if difference < tolerance else f"it is {difference:.0%} away from dense attention"


def _output_and_gradients(attention: Any, qkv: list[Tensor], window: int) -> list[Tensor]:
    out = attention(*qkv, window)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out.float().square().sum(), qkv))]


def cross_attention(
    q_BHTC: Float[Tensor, "B H T C"], keys_BHKC: Float[Tensor, "B H K C"], values_BMD: Float[Tensor, "B M D"]
) -> Float[Tensor, "B T D"]:
    """softmax(q kᵀ / √C) v: every token attends to every thought of its layer.

    The tokens are the last axis of the scores, because on a CPU a softmax over a last axis of length K takes ten times
    as long.
    """
    scores_BHKT = (keys_BHKC * keys_BHKC.shape[-1] ** -0.5) @ q_BHTC.mT
    return scores_BHKT.softmax(-2).flatten(1, 2).mT @ values_BMD


def ring_attention(
    q_BHUC: Float[Tensor, "B H U C"], ring: KeysValues, masked_BUM: Bool[Tensor, "B U M"]
) -> Float[Tensor, "B H U C"]:
    """softmax(q kᵀ / √C) v over the M slots of a ring buffer that are not masked; for padding, all may be masked."""
    size, heads, tokens, channels = q_BHUC.shape
    q = q_BHUC.reshape(size, len(ring.keys_BGMC[0]), -1, channels) * channels**-0.5  # (B, G, H/G · U, C)
    scores_BHUM = (q @ ring.keys_BGMC.mT).view(size, heads, tokens, -1)
    scores_BHUM.masked_fill_(masked_BUM[:, None], torch.finfo(scores_BHUM.dtype).min)
    return (scores_BHUM.softmax(-1).view(*q.shape[:3], -1) @ ring.values_BGMC).view(q_BHUC.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "..."] | None) -> Tensor:
    """softmax(q kᵀ / √C) v where ``mask`` is True; everywhere if it is None.

    Uses torch's fused kernels on CUDA, and plain matrix products on a CPU, where their bfloat16 backward is four to
    eleven times as fast as the fused one at our block sizes.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1) @ v
