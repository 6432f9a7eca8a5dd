"""Attention: tokens to the W tokens up to and including themselves, and tokens to thoughts.

Shapes: B sequences (particles folded in), H heads, T tokens, K thoughts, W window, C channels of a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


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
    size, _, length, _ = q_BHTC.shape
    if length <= window:
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
    blocks = -(-length // window)
    padding = blocks * window - length
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q_BHTC, k_BHTC, v_BHTC))
    mask_bWM = window_mask(window, 2 * window, window, q.device).repeat(blocks, 1, 1)
    mask_bWM[0, :, :window] = False  # before the first block there is nothing
    out = F.scaled_dot_product_attention(
        q.unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1),
        _with_previous_block(k, blocks),
        _with_previous_block(v, blocks),
        attn_mask=mask_bWM[:, None].repeat(size, 1, 1, 1),
    )
    return out.unflatten(0, (size, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _with_previous_block(x_BHTC: Tensor, blocks: int) -> Tensor:
    x_BHbWC = x_BHTC.unflatten(2, (blocks, -1))
    previous = F.pad(x_BHbWC, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.cat([previous, x_BHbWC], dim=3).transpose(1, 2).flatten(0, 1)


def cross_attention(
    q_BHTC: Float[Tensor, "B H T C"], k_BHKC: Float[Tensor, "B H K C"], v_BHKC: Float[Tensor, "B H K C"]
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ / √C) v: every token looks at every thought of its layer."""
    return F.scaled_dot_product_attention(q_BHTC, k_BHKC, v_BHKC)
