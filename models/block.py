"""One layer of the decoder. Shapes: B sequences (particles folded in), T tokens, U new tokens, D width."""

from jaxtyping import Float
from torch import Tensor, nn

from ltm_pyro.nn.attention import KeysValues, ThoughtKV
from ltm_pyro.nn.kv_cache import CacheSlots
from ltm_pyro.nn.layers import CrossAttention, RotaryAngles, SelfAttention, SwiGLU
from ltm_pyro.nn.rms_norm import RMSNorm


class Block(nn.Module):
    """One layer: x += SelfAttention(x), x += CrossAttention(x, z), x += SwiGLU(x), each behind an RMSNorm."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, window: int, thought_width: int | None, attention: str
    ) -> None:
        super().__init__()
        self.norm_self = RMSNorm(width)
        self.self_attention = SelfAttention(width, heads, kv_heads, window, attention)
        self.norm_cross = self.cross_attention = None
        if thought_width is not None:
            self.norm_cross = RMSNorm(width)
            self.cross_attention = CrossAttention(width, heads, kv_heads, thought_width)
        self.norm_forward, self.feed_forward = RMSNorm(width), SwiGLU(width)

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, thoughts: ThoughtKV | None, attended: bool
    ) -> Float[Tensor, "B T D"]:
        """The whole layer, or what follows the self-attention if ``attended``."""
        x_BTD = x_BTD if attended else self.attend_to_tokens(x_BTD, angles)
        return self.transform(self.attend_to_thoughts(x_BTD, angles, thoughts))

    def attend_to_tokens(self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles) -> Float[Tensor, "B T D"]:
        """The self-attention."""
        return x_BTD + self.self_attention(self.norm_self(x_BTD), angles)

    def attend_to_cache(
        self, x_BUD: Float[Tensor, "B U D"], angles: RotaryAngles, ring: KeysValues, slots: CacheSlots
    ) -> Float[Tensor, "B U D"]:
        """The self-attention of new tokens to those in the cache, which takes them in."""
        return x_BUD + self.self_attention.decode_step(self.norm_self(x_BUD), angles, ring, slots)

    def attend_to_thoughts(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, thoughts: ThoughtKV | None
    ) -> Float[Tensor, "B T D"]:
        """The cross-attention to this layer's thoughts; nothing without them."""
        if self.cross_attention is None or self.norm_cross is None or thoughts is None:
            return x_BTD
        return x_BTD + self.cross_attention(self.norm_cross(x_BTD), angles, thoughts)

    def transform(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The feed-forward."""
        return x_BTD + self.feed_forward(self.norm_forward(x_BTD))
