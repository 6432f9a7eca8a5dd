"""The decoder's parts: rotary positions, attention sublayers and the gated feed-forward. Tensors in, tensors out.

Shapes: B sequences (particles folded in), T tokens, K thoughts, D width, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ltm_pyro.attention import KeysValues, cross_attention, ring_attention, window_attention
from ltm_pyro.cache import Reading

Turn = tuple[Tensor, Tensor]  # cosine and sine of every position's angles, one per pair of channels


def rotation(position: Int[Tensor, "*T"], channels: int, dtype: torch.dtype, base: float = 10_000.0) -> Turn:
    """Channel pair c of position t turns by the angle t · base^(−2c/C) (RoFormer, arXiv 2104.09864)."""
    half = torch.arange(0, channels, 2, device=position.device, dtype=torch.float32)
    angle = position.float()[..., None] * base ** (-half / channels)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x_BHTC: Float[Tensor, "B H T C"], turn: Turn) -> Float[Tensor, "B H T C"]:
    """The vectors turned, each by its position's angles; what two of them then share depends on their distance."""
    cos, sin = turn
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

    def queries(self, x_BTD: Float[Tensor, "B T D"], turn: Turn) -> Float[Tensor, "B H T C"]:
        """Queries of the tokens, turned."""
        return rotary(self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2), turn)

    def keys_values(self, memory_BMD: Float[Tensor, "B M memory"], turn: Turn) -> KeysValues:
        """Keys, turned, and values of tokens or thoughts, each of shape (B, ``kv_heads``, M, C)."""
        k, v = (p(memory_BMD).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for p in (self.key, self.value))
        return KeysValues(rotary(k, turn), v)

    def merge(self, x_BHTC: Float[Tensor, "B H T C"]) -> Float[Tensor, "B T D"]:
        """The heads side by side, projected."""
        return self.output(x_BHTC.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Causal attention of tokens to the last ``window`` tokens, themselves included; see `attention.BACKENDS`."""

    def __init__(self, width: int, heads: int, kv_heads: int, window: int, attention: str = "auto") -> None:
        super().__init__(width, heads, kv_heads, width)
        self.window, self.attention = window, attention

    def forward(self, x_BTD: Float[Tensor, "B T D"], turn: Turn) -> Float[Tensor, "B T D"]:
        """Attention's output for normalised input; the caller adds the residual."""
        k, v = self.keys_values(x_BTD, turn).spread(self.heads)
        return self.merge(window_attention(self.queries(x_BTD, turn), k, v, self.window, self.attention))

    def read(
        self, x_BUD: Float[Tensor, "B U D"], turn: Turn, ring: KeysValues, reading: Reading
    ) -> Float[Tensor, "B U D"]:
        """The same for tokens behind those whose keys and values are in ``ring``, which then takes in theirs."""
        new = self.keys_values(x_BUD, turn)
        out_BHUC = ring_attention(self.queries(x_BUD, turn), ring, new, reading.mask_BUM)
        for remembered, x in zip(ring, new, strict=True):
            reading.write(remembered, x)
        return self.merge(out_BHUC)


class CrossAttention(Attention):
    """Attention of tokens to the K thoughts of their layer; tokens and thoughts each carry rotary positions."""

    def forward(self, x_BTD: Float[Tensor, "B T D"], turn: Turn, thoughts: KeysValues) -> Float[Tensor, "B T D"]:
        """Attention's output for normalised input; the caller adds the residual."""
        return self.merge(cross_attention(self.queries(x_BTD, turn), *thoughts.spread(self.heads)))


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
