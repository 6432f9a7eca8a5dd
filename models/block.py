"""One layer of the decoder. Shapes: B sequences (particles folded in), T tokens, U new tokens, D width."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ltm_pyro.nn.attention import KeysValues, ThoughtKV
from ltm_pyro.nn.kv_cache import CacheSlots
from ltm_pyro.nn.layers import CrossAttention, RotaryAngles, SelfAttention, SwiGLU
from ltm_pyro.nn.rms_norm import RMSNorm


class Block(nn.Module):
    """One pre-norm layer: x += SelfAttention(x), x += CrossAttention(x, z), x += SwiGLU(x), each after an RMSNorm.

    Args:
        width, heads, kv_heads, window, attention: as for `Decoder`; without a window attention is full, not causal.
        thought_width: of the thoughts that the layer attends to; None for a layer without cross-attention.
        learned_keys: K thoughts have learned keys; 0 if keys are computed from the thoughts.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        window: int | None,
        thought_width: int | None,
        attention: str,
        learned_keys: int = 0,
    ) -> None:
        super().__init__()
        self.norm_self = RMSNorm(width)
        self.self_attention = SelfAttention(width, heads, kv_heads, window, attention)
        self.norm_cross = self.cross_attention = None
        if thought_width is not None:
            self.norm_cross = RMSNorm(width)
            self.cross_attention = CrossAttention(width, heads, kv_heads, thought_width, learned_keys)
        self.norm_forward, self.feed_forward = RMSNorm(width), SwiGLU(width)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        angles: RotaryAngles,
        thoughts: ThoughtKV | None,
        visible_BT: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The whole layer; ``visible_BT`` are the tokens that full attention sees."""
        return self.after_self_attention(self.attend_to_tokens(x_BTD, angles, visible_BT), angles, thoughts)

    def attend_to_tokens(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, visible_BT: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The self-attention sublayer."""
        return x_BTD + self.self_attention(self.norm_self(x_BTD), angles, visible_BT)

    def attend_to_cache(
        self, x_BUD: Float[Tensor, "B U D"], angles: RotaryAngles, ring: KeysValues, slots: CacheSlots
    ) -> Float[Tensor, "B U D"]:
        """The self-attention sublayer for new tokens: their keys and values are added to the cache, in place."""
        return x_BUD + self.self_attention.decode_step(self.norm_self(x_BUD), angles, ring, slots)

    def after_self_attention(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, thoughts: ThoughtKV | None
    ) -> Float[Tensor, "B T D"]:
        """The cross-attention sublayer, left out if ``thoughts`` is None, and the feed-forward sublayer."""
        if self.cross_attention is not None and self.norm_cross is not None and thoughts is not None:
            x_BTD = x_BTD + self.cross_attention(self.norm_cross(x_BTD), angles, thoughts)
        return x_BTD + self.feed_forward(self.norm_forward(x_BTD))
