"""The decoder's parts: rotary positions, attention sublayers and the gated feed-forward. Tensors in, tensors out.

Shapes: B sequences (particles folded in), T tokens, K thoughts, D width, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.attention import cross_attention, window_attention


def rotary(x_BHTC: Float[Tensor, "B H T C"], first: int = 0, base: float = 10_000.0) -> Float[Tensor, "B H T C"]:
    """Rotates channel pair c of position t by the angle t · base^(−2c/C) (RoFormer, arXiv 2104.09864)."""
    length, channels = x_BHTC.shape[-2:]
    half = torch.arange(0, channels, 2, device=x_BHTC.device, dtype=torch.float32)
    position_T = torch.arange(first, first + length, device=x_BHTC.device, dtype=torch.float32)
    angle_Tc = position_T[:, None] * base ** (-half / channels)
    cos, sin = angle_Tc.cos().to(x_BHTC.dtype), angle_Tc.sin().to(x_BHTC.dtype)
    even, odd = x_BHTC.chunk(2, dim=-1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


class Attention(nn.Module):
    """Projections around an attention: H query heads share ``kv_heads`` key and value heads.

    ``memory_width`` is the width of what is attended to (the tokens' own for self-attention).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, channels = heads, kv_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(memory_width, kv_heads * channels, bias=False)
        self.value = nn.Linear(memory_width, kv_heads * channels, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def queries(self, x_BTD: Float[Tensor, "B T D"], first: int = 0) -> Float[Tensor, "B H T C"]:
        """Rotated queries of tokens at positions ``first``, ``first + 1``, …"""
        return rotary(self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2), first)

    def keys_values(
        self, memory_BMD: Float[Tensor, "B M memory"], first: int = 0
    ) -> tuple[Float[Tensor, "B H M C"], Float[Tensor, "B H M C"]]:
        """Rotated keys, and values, of tokens or thoughts at positions ``first``, ``first + 1``, …"""
        k, v = (p(memory_BMD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for p in (self.key, self.value))
        group = self.heads // self.kv_heads
        return rotary(k, first).repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def merge(self, x_BHTC: Float[Tensor, "B H T C"]) -> Float[Tensor, "B T D"]:
        """The heads side by side, projected."""
        return self.output(x_BHTC.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Causal attention of tokens to the last ``window`` tokens, themselves included."""

    def __init__(self, width: int, heads: int, kv_heads: int, window: int) -> None:
        super().__init__(width, heads, kv_heads, width)
        self.window = window

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Attention's output for normalised input; the caller adds the residual."""
        return self.merge(window_attention(self.queries(x_BTD), *self.keys_values(x_BTD), self.window))


class CrossAttention(Attention):
    """Attention of tokens to the K thoughts of their layer; tokens and thoughts each carry rotary positions."""

    def forward(self, x_BTD: Float[Tensor, "B T D"], z_BKD: Float[Tensor, "B K thought"]) -> Float[Tensor, "B T D"]:
        """Attention's output for normalised input; the caller adds the residual."""
        return self.merge(cross_attention(self.queries(x_BTD), *self.keys_values(z_BKD)))


class SwiGLU(nn.Module):
    """W₂ (silu(W₁ x) ⊙ W₃ x) with 8D/3 hidden units, rounded up to a multiple of 32 (arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 32) * 32
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The sublayer's output for normalised input; the caller adds the residual."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
