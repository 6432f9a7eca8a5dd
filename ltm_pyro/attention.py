"""Attention: tokens to the W tokens up to and including themselves, and tokens to thoughts.

Shapes: B sequences (particles folded in), H heads, G key and value heads, T tokens, U new ones, K thoughts, W window,
C channels of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KeysValues(NamedTuple):
    """What queries look at."""

    keys_BGMC: Float[Tensor, "B G M C"]
    values_BGMC: Float[Tensor, "B G M C"]

    def select(self, index_b: Int[Tensor, " b"]) -> "KeysValues":
        """Those of some sequences."""
        return KeysValues(*(x[index_b] for x in self))

    def spread(self, heads: int) -> "KeysValues":
        """A copy for each of ``heads`` query heads; neighbours share."""
        group = heads // self.keys_BGMC.shape[1]
        return self if group == 1 else KeysValues(*(x.repeat_interleave(group, 1) for x in self))


def window_mask(queries: int, keys: int, window: int, device: torch.device | None = None) -> Bool[Tensor, "Q M"]:
    """True where query i, aligned with the last of the keys, sees key j: 0 ≤ i + (keys − queries) − j < window."""
    i_Q1 = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance_QM = i_Q1 - torch.arange(keys, device=device)
    return (distance_QM >= 0) & (distance_QM < window)


def dense_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v over the last ``window`` tokens, self included; T² work. The truth the others meet."""
    length = q_BHTC.shape[-2]
    mask_TT = window_mask(length, length, window, q_BHTC.device)
    return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=mask_TT)


def window_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHTC: Float[Tensor, "B H T C"], v_BHTC: Float[Tensor, "B H T C"], window: int
) -> Float[Tensor, "B H T C"]:
    """What `dense_attention` computes, in 2·T·W work: blocks of W queries look at their own and the previous block."""
    length = q_BHTC.shape[2]
    if length <= window:
        return attend(q_BHTC, k_BHTC, v_BHTC, window_mask(length, length, window, q_BHTC.device))
    blocks = -(-length // window)
    q, k, v = (
        F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)) for x in (q_BHTC, k_BHTC, v_BHTC)
    )
    mask_bWM = window_mask(window, 2 * window, window, q.device).repeat(blocks, 1, 1)
    mask_bWM[0, :, :window] = False  # before the first block there is nothing
    out_BHbWC = attend(q, _with_previous_block(k), _with_previous_block(v), mask_bWM)
    return out_BHbWC.flatten(2, 3)[:, :, :length]


def _with_previous_block(x_BHbWC: Tensor) -> Tensor:
    previous = F.pad(x_BHbWC, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat([previous, x_BHbWC], dim=3)


def cross_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHKC: Float[Tensor, "B H K C"], v_BHKC: Float[Tensor, "B H K C"]
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v: every token looks at every thought of its layer."""
    return attend(q_BHTC, k_BHKC, v_BHKC)


def ring_attention(
    q_BHUC: Float[Tensor, "B H U C"], ring: KeysValues, new: KeysValues, mask_BUM: Bool[Tensor, "B U M"]
) -> Float[Tensor, "B H U C"]:
    """softmax(q kᵀ / √C) v over the W remembered keys and the U new ones, M = W + U; nothing remembered is copied."""
    size, heads, tokens, channels = q_BHUC.shape
    q = q_BHUC.reshape(size, len(ring.keys_BGMC[0]), -1, channels) * channels**-0.5  # (B, G, H/G · U, C)
    scores = torch.cat([q @ x.keys_BGMC.mT for x in (ring, new)], dim=-1).view(size, heads, tokens, -1)
    weights = scores.masked_fill(~mask_BUM[:, None], -torch.inf).softmax(-1).view(*q.shape[:3], -1)
    seen, fresh = weights.split([weights.shape[-1] - tokens, tokens], dim=-1)
    return (seen @ ring.values_BGMC + fresh @ new.values_BGMC).view(q_BHUC.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Tensor:
    """softmax(q kᵀ / √C) v where ``mask`` is True.

    On CUDA torch's fused kernels; on a CPU plain matrix products, whose backward in bfloat16 is four to eleven times
    as fast as the fused one at our block sizes.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v
