"""p_β(x | z)'s network: a causal Transformer whose every layer attends to thoughts of its own. No sampling inside.

Shapes: B sequences, T tokens, L layers, K thoughts per layer, D width, S particles. Leading axes of z are free.
"""

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from ltm_pyro.contracts import ThoughtShape, UsageError
from ltm_pyro.layers import CrossAttention, SelfAttention, SwiGLU


class Block(nn.Module):
    """One layer: x += SelfAttention(x), x += CrossAttention(x, z), x += SwiGLU(x), each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, kv_heads: int, window: int, thought_width: int | None) -> None:
        super().__init__()
        self.norm_self, self.self_attention = nn.RMSNorm(width), SelfAttention(width, heads, kv_heads, window)
        self.norm_cross = self.cross_attention = None
        if thought_width is not None:
            self.norm_cross = nn.RMSNorm(width)
            self.cross_attention = CrossAttention(width, heads, kv_heads, thought_width)
        self.norm_forward, self.feed_forward = nn.RMSNorm(width), SwiGLU(width)

    def attend_to_tokens(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The self-attention."""
        return x_BTD + self.self_attention(self.norm_self(x_BTD))

    def attend_to_thoughts(
        self, x_BTD: Float[Tensor, "B T D"], z_BKD: Float[Tensor, "B K thought"]
    ) -> Float[Tensor, "B T D"]:
        """The cross-attention to this layer's thoughts; absent when K = 0."""
        if self.cross_attention is None or self.norm_cross is None:
            return x_BTD
        return x_BTD + self.cross_attention(self.norm_cross(x_BTD), z_BKD)

    def transform(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The feed-forward."""
        return x_BTD + self.feed_forward(self.norm_forward(x_BTD))


class Decoder(nn.Module):
    r"""The network of :math:`p_\beta(x \mid z) = \prod_t p_\beta(x_t \mid z, x_{t-W \ldots t-1})`.

    Pre-norm RMSNorm, rotary positions, SwiGLU, no biases; logits are hidden · embeddingᵀ (tied). Each layer's
    self-attention sees ``window`` tokens, itself included; its cross-attention sees its own K thoughts.
    ``thoughts=0`` is the plain autoregressive baseline, with no parameter left over. Source: arXiv 2502.01567,
    section 2; our ``window`` is the paper's k, ``thoughts`` · ``layers`` its N_z.

    Args:
        vocabulary: V.
        layers, width, heads: L, D and the number of query heads, which divides D.
        thoughts: K, thought vectors per layer.
        window: W tokens of self-attention.
        length: T, the longest sequence the model is meant for.
        thought_width: width of a thought, D when not given.
        kv_heads: key and value heads, a divisor of ``heads`` (grouped attention); ``heads`` when not given.
        quiet_thoughts: the cross-attention's output starts at zero, so that thoughts can be added to a decoder that
            has learned to speak without them: the first bound then equals the autoregressive loss.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int = 3,
        width: int = 512,
        heads: int = 8,
        thoughts: int = 8,
        window: int = 256,
        length: int = 1024,
        thought_width: int | None = None,
        kv_heads: int | None = None,
        quiet_thoughts: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        for name, size in {"vocabulary": vocabulary, "layers": layers, "window": window, "length": length}.items():
            if size < 1:
                raise UsageError(f"The decoder's {name} must be at least 1, got {size}.")
        _check_heads(width, heads, kv_heads)
        self.vocabulary, self.width, self.window, self.length = vocabulary, width, window, length
        self.thought_shape = ThoughtShape(layers, thoughts, thought_width or width)
        self.listening = True  # False leaves the cross-attention out, as the first stage of a warm start does
        memory = self.thought_shape.width if thoughts else None
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, window, memory) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self._initialise(layers, quiet_thoughts)

    def _initialise(self, layers: int, quiet_thoughts: bool) -> None:
        """N(0, 1 / fan-in); what is added to the residual stream is smaller by √(2L), as in GPT-2.

        At small widths GPT-2's fixed 0.02 is far too timid: a decoder of width 64 stood at 5.3 nats per token after
        250 steps with it, at 4.6 with this rule and the rate it allows. With ``quiet_thoughts`` the cross-attention
        adds exactly nothing at first.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)
            if quiet_thoughts and name.endswith("cross_attention.output.weight"):
                nn.init.zeros_(weight)

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def stem(self, inputs_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings and the first layer's self-attention: everything that comes before the first thought."""
        if inputs_BT.shape[1] > self.length:
            raise UsageError(
                f"A sequence has {inputs_BT.shape[1]} tokens, but the model's length is {self.length}: "
                f"cut the text, or train with a larger `length`."
            )
        return self._layers()[0].attend_to_tokens(self.embedding(inputs_BT))

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"]
    ) -> Float[Tensor, "... B T D"]:
        """Hidden states before the vocabulary projection, for every particle of z."""
        lead = z_BLKD.shape[:-4]
        z_LBKD = z_BLKD.flatten(0, len(lead)).unbind(1) if lead else z_BLKD.unbind(1)
        x_BTD = stem_BTD.expand(*lead, *stem_BTD.shape).flatten(0, len(lead))
        for index, (block, z_BKD) in enumerate(zip(self._layers(), z_LBKD, strict=True)):
            x_BTD = x_BTD if index == 0 else block.attend_to_tokens(x_BTD)
            x_BTD = block.transform(block.attend_to_thoughts(x_BTD, z_BKD) if self.listening else x_BTD)
        return self.norm(x_BTD).unflatten(0, (*lead, -1)) if lead else self.norm(x_BTD)


def _check_heads(width: int, heads: int, kv_heads: int) -> None:
    if min(width, heads, kv_heads) < 1:
        raise UsageError(f"Width, heads and kv_heads must be at least 1, got {width}, {heads} and {kv_heads}.")
    if width % (2 * heads):
        raise UsageError(f"Width {width} is not a multiple of 2 x heads = {2 * heads}: change `width` or `heads`.")
    if heads % kv_heads:
        raise UsageError(f"kv_heads {kv_heads} does not divide heads {heads}: choose a divisor for `kv_heads`.")
