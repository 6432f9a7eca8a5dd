"""Layers of the decoder: rotary positions, self-attention, cross-attention and the gated feed-forward network.

Shapes: B sequences (times particles), T tokens, K thoughts, D width, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ltm_pyro.nn.attention import (
    KeysValues,
    ThoughtKV,
    cross_attention,
    full_attention,
    ring_attention,
    window_attention,
)
from ltm_pyro.nn.kv_cache import CacheSlots

RotaryAngles = Tensor  # (..., T, 1, C/2, 2): cosine and sine of one angle per position and pair of channels


def rotation(position: Int[Tensor, "*T"], channels: int, base: float = 10_000.0) -> RotaryAngles:
    """The angles t · base^(−2c/C) for position t and channel pair c (RoFormer, arXiv 2104.09864)."""
    half = torch.arange(0, channels, 2, device=position.device, dtype=torch.float32)
    angle = position.float()[..., None, None] * base ** (-half / channels)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotary(x_BTHC: Float[Tensor, "B T H C"], angles: RotaryAngles) -> Float[Tensor, "B T H C"]:
    """Rotates every pair of neighbouring channels by its position's angle.

    The dot product of two rotated vectors depends on their relative position only. A pair is multiplied as one complex
    number, except under torch.compile, which does not support complex numbers.
    """
    wide = x_BTHC.to(torch.promote_types(x_BTHC.dtype, angles.dtype)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = wide.unbind(-1), angles.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        angle = torch.view_as_complex(angles.to(wide.dtype))
        rotated = torch.view_as_real(torch.view_as_complex(wide) * angle)
    return rotated.flatten(-2).to(x_BTHC.dtype)


class Attention(nn.Module):
    """Base of the attention layers: H query heads, which share ``kv_heads`` key and value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads, self.channels = width, heads, kv_heads, width // heads
        self.output = nn.Linear(width, width, bias=False)

    def split(self, x_BTP: Float[Tensor, "B T P"]) -> Float[Tensor, "B T H C"]:
        """A projection's output, split into heads."""
        return x_BTP.unflatten(-1, (-1, self.channels))

    def merge(self, x_BHTC: Float[Tensor, "B H T C"]) -> Float[Tensor, "B T D"]:
        """The concatenated heads, projected by W_o."""
        return self.output(x_BHTC.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Causal attention of every token to the last ``window`` tokens, itself included; see `attention.BACKENDS`.

    Without a window every token attends to all visible ones, also to those behind it.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, window: int | None, attention: str = "auto") -> None:
        super().__init__(width, heads, kv_heads)
        self.window, self.attention = window, attention
        self.query_key_value = nn.Linear(width, (heads + 2 * kv_heads) * self.channels, bias=False)

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, visible_BT: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The layer's output for normalised input; the caller adds the residual.

        Args:
            visible_BT: the tokens that are attended to without a window, such as all but padding; by default all.
        """
        q_BHTC, new = self.project(x_BTD, angles)
        new = new.repeat_heads(self.heads)
        if self.window is not None:
            return self.merge(window_attention(q_BHTC, *new, self.window, self.attention))
        return self.merge(full_attention(q_BHTC, *new, visible_BT))

    def project(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles
    ) -> tuple[Float[Tensor, "B H T C"], KeysValues]:
        """Rotated queries and keys, and values of tokens."""
        rotated = self.heads + self.kv_heads
        qk_BTHC, v_BTGC = self.split(self.query_key_value(x_BTD)).split([rotated, self.kv_heads], dim=2)
        q, k = rotary(qk_BTHC, angles).split([self.heads, self.kv_heads], dim=2)
        return q.transpose(1, 2), KeysValues(k.transpose(1, 2), v_BTGC.transpose(1, 2))

    def decode_step(
        self, x_BUD: Float[Tensor, "B U D"], angles: RotaryAngles, ring: KeysValues, slots: CacheSlots
    ) -> Float[Tensor, "B U D"]:
        """The same for new tokens, which attend to the cache ``ring`` and are added to it in place."""
        q_BHUC, new = self.project(x_BUD, angles)
        for cached, x in zip(ring, new, strict=True):
            slots.write(cached, x)
        return self.merge(ring_attention(q_BHUC, ring, slots.masked_BUM))


class CrossAttention(Attention):
    """Attention of tokens to the K thoughts of their layer, both with rotary positions of their own.

    Args:
        learned_keys: K, if each thought has a learned key (``keys_KGC``) and gives its value only; 0 if keys are
            computed from the thoughts.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, thought_width: int, learned_keys: int = 0) -> None:
        super().__init__(width, heads, kv_heads)
        self.query = nn.Linear(width, width, bias=False)
        parts = 1 if learned_keys else 2
        self.key_value = nn.Linear(thought_width, parts * kv_heads * self.channels, bias=False)
        self.keys_KGC: nn.Parameter | None = None
        if learned_keys:
            self.keys_KGC = nn.Parameter(torch.randn(learned_keys, kv_heads, self.channels))

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, thoughts: ThoughtKV
    ) -> Float[Tensor, "B T D"]:
        """The layer's output for normalised input; the caller adds the residual."""
        return cross_attention(self.queries(x_BTD, angles), *thoughts)

    def queries(self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles) -> Float[Tensor, "B H T C"]:
        """Rotated queries of the tokens."""
        return rotary(self.split(self.query(x_BTD)), angles).transpose(1, 2)

    def project_kv(self, z_BKD: Float[Tensor, "B K thought"], angles: RotaryAngles) -> ThoughtKV:
        """Rotated keys and projected values of thoughts."""
        projected = self.split(self.key_value(z_BKD))
        if self.keys_KGC is None:
            k, v = projected.chunk(2, dim=2)
        else:
            k, v = self.keys_KGC.to(projected.dtype).expand(len(z_BKD), -1, -1, -1), projected
        k_BHKC, v_BHKC = KeysValues(rotary(k, angles).transpose(1, 2), v.transpose(1, 2)).repeat_heads(self.heads)
        output_HCD = self.output.weight.T.unflatten(0, (self.heads, self.channels))
        values_HND = v_BHKC.transpose(0, 1).flatten(1, 2) @ output_HCD
        return ThoughtKV(k_BHKC, values_HND.unflatten(1, z_BKD.shape[:2]).transpose(0, 1).flatten(1, 2))


class SwiGLU(nn.Module):
    """W₂ (silu(W₁ x) ⊙ W₃ x) with 8D/3 hidden units, rounded up to a multiple of 32 (arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 32) * 32
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)  # W₁ and W₃
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The layer's output for normalised input; the caller adds the residual."""
        gate_HD, up_HD = self.gate_up.weight.chunk(2)  # two products, because halves of one product are not contiguous
        return self.down(F.silu(F.linear(x_BTD, gate_HD)) * F.linear(x_BTD, up_HD))
