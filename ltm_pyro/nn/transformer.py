"""A small Transformer for learned priors and encoders, causal or not.

Shapes: B sequences, T positions, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.errors import UsageError
from ltm_pyro.nn.layers import SelfAttention, SwiGLU, rotation
from ltm_pyro.nn.rms_norm import RMSNorm


class Transformer(nn.Module):
    """The decoder's layers without thoughts: x += SelfAttention(x), x += SwiGLU(x), each with an RMSNorm before it.

    Args:
        layers, width, heads: 2 · ``heads`` divides ``width``.
        window: number of positions that each one attends to, itself included; None for all, also those behind it.
    """

    def __init__(self, layers: int, width: int, heads: int, window: int | None) -> None:
        super().__init__()
        if min(layers, width, heads) < 1 or width % (2 * heads):
            raise UsageError(
                f"Layers, width and heads must be at least 1 and 2 x heads divide the width, "
                f"got {layers}, {width} and {heads}."
            )
        self.channels = width // heads
        self.attention = nn.ModuleList(SelfAttention(width, heads, heads, window) for _ in range(layers))
        self.feed = nn.ModuleList(SwiGLU(width) for _ in range(layers))
        self.norm = nn.ModuleList(RMSNorm(width) for _ in range(2 * layers + 1))

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The hidden states, normalised."""
        angles = rotation(torch.arange(x_BTD.shape[1], device=x_BTD.device), self.channels)
        for index, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x_BTD = x_BTD + attention(self.norm[2 * index](x_BTD), angles)
            x_BTD = x_BTD + feed(self.norm[2 * index + 1](x_BTD))
        return self.norm[-1](x_BTD)
