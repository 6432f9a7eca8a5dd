"""p_β(x | z)'s network: a causal Transformer whose every layer attends to thoughts of its own. No sampling inside.

Shapes: B sequences, T tokens, L layers, K thoughts per layer, D width, S particles. Leading axes of z are free.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import count
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.nn.attention import KeysValues, ThoughtKV
from ltm_pyro.nn.kv_cache import Cache, CacheSlots, cache_slots
from ltm_pyro.nn.layers import CrossAttention, RMSNorm, RotaryAngles, SelfAttention, SwiGLU, rotation
from ltm_pyro.nn.precision import matrix_dtype


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
        """The whole layer; what ``attended`` to the tokens already goes on from there."""
        x_BTD = x_BTD if attended else self.attend_to_tokens(x_BTD, angles)
        return self.transform(self.attend_to_thoughts(x_BTD, angles, thoughts))

    def attend_to_tokens(self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles) -> Float[Tensor, "B T D"]:
        """The self-attention."""
        return x_BTD + self.self_attention(self.norm_self(x_BTD), angles)

    def attend_to_past(
        self, x_BUD: Float[Tensor, "B U D"], angles: RotaryAngles, ring: KeysValues, cache_slots: CacheSlots
    ) -> Float[Tensor, "B U D"]:
        """The self-attention of tokens behind those in ``ring``, which takes them in."""
        return x_BUD + self.self_attention.decode_step(self.norm_self(x_BUD), angles, ring, cache_slots)

    def attend_to_thoughts(
        self, x_BTD: Float[Tensor, "B T D"], angles: RotaryAngles, thoughts: ThoughtKV | None
    ) -> Float[Tensor, "B T D"]:
        """The cross-attention to this layer's thoughts; absent without them."""
        if self.cross_attention is None or self.norm_cross is None or thoughts is None:
            return x_BTD
        return x_BTD + self.cross_attention(self.norm_cross(x_BTD), angles, thoughts)

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
        thought_layers: the layers that hear thoughts, counted from 1; all when not given. What lies below the first of
            them is computed once per batch, not once per fast step. The L of z counts these layers.
        kv_heads: key and value heads, a divisor of ``heads`` (grouped attention); ``heads`` when not given.
        quiet_thoughts: the cross-attention's output starts at zero, so that thoughts can be added to a decoder that
            has learned to speak without them: the first bound then equals the autoregressive loss.
        attention: what computes the self-attention: ``dense``, ``sdpa``, ``xformers`` or ``flex``, of which ``auto``
            takes the fastest that runs here (see `ltm_pyro.nn.attention`).
        recompute: keeps the hidden states between layers only and computes the rest again in the backward pass: less
            memory, a third more work.
    """

    half_precision = True  # its matrix products follow autocast
    rotary_angles: Tensor  # of every position

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
        thought_layers: list[int] | None = None,
        kv_heads: int | None = None,
        zero_init_cross_attention: bool = False,
        attention: Literal["auto", "sdpa", "xformers", "flex", "dense"] = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        for name, size in {"vocabulary": vocabulary, "layers": layers, "window": window, "length": length}.items():
            if size < 1:
                raise UsageError(f"The decoder's {name} must be at least 1, got {size}.")
        _check_heads(width, heads, kv_heads)
        self.vocabulary, self.width, self.heads = vocabulary, width, heads
        self.window, self.length = window, length
        self.recompute = recompute
        self.layers, self.thought_layers = layers, _check_thought_layers(thought_layers, layers)
        self.thought_shape = ThoughtShape(len(self.thought_layers), thoughts, thought_width or width)
        self.use_thoughts = True  # False leaves the cross-attention out, as the first stage of a warm start does
        memory = [self.thought_shape.width if thoughts and n in self.thought_layers else None for n in _count(layers)]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, window, one, attention) for one in memory)
        self.norm = RMSNorm(width)
        rotary_angles = rotation(torch.arange(max(length, thoughts)), width // heads)
        self.register_buffer("rotary_angles", rotary_angles, persistent=False)
        self._initialise(layers, zero_init_cross_attention)

    def _initialise(self, layers: int, zero_init_cross_attention: bool) -> None:
        """N(0, 1 / fan-in); what is added to the residual stream is smaller by √(2L), as in GPT-2.

        At small widths GPT-2's fixed 0.02 is far too timid: a decoder of width 64 stood at 5.3 nats per token after
        250 steps with it, at 4.6 with this rule and the rate it allows. With ``quiet_thoughts`` the cross-attention
        adds exactly nothing at first.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)
            if zero_init_cross_attention and name.endswith("cross_attention.output.weight"):
                nn.init.zeros_(weight)

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def stem(self, inputs_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings, and what follows up to the self-attention of the first layer that hears thoughts."""
        if inputs_BT.shape[1] > self.length:
            raise UsageError(
                f"A sequence has {inputs_BT.shape[1]} tokens, but the model's length is {self.length}: "
                f"cut the text, or train with a larger `length`."
            )
        weight_VD = self.embedding.weight
        if inputs_BT.device != weight_VD.device:
            raise UsageError(
                f"The batch is on {inputs_BT.device}, but the model on {weight_VD.device}: "
                f'move one of them, such as batch.to("{weight_VD.device}").'
            )
        angles, first = self.rotary_angles[: inputs_BT.shape[1]], self.thought_layers[0] - 1
        x_BTD = F.embedding(inputs_BT, weight_VD, sparse=True)  # the rows' gradient, not all of V x D
        for block in self._layers()[:first]:
            x_BTD = self._through(block, x_BTD, angles, None, False)
        return self._layers()[first].attend_to_tokens(x_BTD, angles)

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"]
    ) -> Float[Tensor, "... B T D"]:
        """Hidden states before the vocabulary projection, for every particle of z."""
        lead = z_BLKD.shape[:-4]
        x_BTD = stem_BTD.expand(*lead, *stem_BTD.shape).flatten(0, len(lead))
        thoughts, angles = self.thoughts(z_BLKD.flatten(0, len(lead))), self.rotary_angles[: stem_BTD.shape[1]]
        first = self.thought_layers[0] - 1
        for index, (block, own) in enumerate(zip(self._layers()[first:], thoughts[first:], strict=True)):
            x_BTD = self._through(block, x_BTD, angles, own, index == 0)
        return self.norm(x_BTD).unflatten(0, (*lead, -1)) if lead else self.norm(x_BTD)

    def logits(self, hidden_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The next token's logits, hidden · embeddingᵀ."""
        return F.linear(hidden_BTD, self.embedding.weight)

    def _through(
        self,
        block: Block,
        x_BTD: Float[Tensor, "B T D"],
        angles: RotaryAngles,
        thoughts: ThoughtKV | None,
        attended: bool,
    ) -> Float[Tensor, "B T D"]:
        if self.recompute and torch.is_grad_enabled():
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn here
            return cast(Tensor, again(block, x_BTD, angles, thoughts, attended))
        return cast(Tensor, block(x_BTD, angles, thoughts, attended))

    def thoughts(self, z_BLKD: Float[Tensor, "B L K thought"]) -> list[ThoughtKV | None]:
        """What every layer remembers of its thoughts; None where it hears none."""
        angles, z = self.rotary_angles[: z_BLKD.shape[2]], dict(zip(self.thought_layers, z_BLKD.unbind(1), strict=True))
        return [
            block.cross_attention.project_kv(z[number], angles) if self.use_thoughts and block.cross_attention else None
            for number, block in zip(_count(self.layers), self._layers(), strict=True)
        ]

    def init_cache(self, z_BLKD: Float[Tensor, "B L K thought"]) -> Cache:
        """The memory of B rows that have thought and not yet read; see `read`."""
        self_attention = self._layers()[0].self_attention
        heads, channels = self_attention.kv_heads, self_attention.channels
        shape, dtype = (len(z_BLKD), heads, 2 * self.window, channels), matrix_dtype(self.embedding.weight)
        empty = z_BLKD.new_zeros(shape, dtype=dtype)
        rings = [KeysValues(empty.clone(), empty.clone()) for _ in self.blocks]
        read_B = torch.zeros(len(z_BLKD), dtype=torch.long, device=z_BLKD.device)
        return Cache(self.thoughts(z_BLKD), rings, read_B)

    def decode_step(
        self,
        tokens_BT: Int[Tensor, "B T"],
        cache: Cache,
        lengths_B: Int[Tensor, " B"] | None = None,
        compile: bool = False,
    ) -> Float[Tensor, "B D"]:
        """The hidden state behind the last token of every row, from which the next one is predicted.

        A token costs the same wherever it stands: it sees what ``cache`` remembers, and is remembered there, in place.

        Args:
            tokens_BT: each row's next tokens, padded on the right.
            lengths_B: how many of them are a row's own, at least one; T when not given.
            compile: runs steps of a single token compiled by torch.
        """
        decode_block = _compiled_decode_step() if compile and tokens_BT.shape[1] == 1 else Decoder._decode_block
        hidden_BD = self.embedding.weight.new_zeros(len(tokens_BT), self.width)
        for first, piece_BU in zip(count(0, self.window), tokens_BT.split(self.window, 1)):
            if lengths_B is None:
                new_B = torch.full_like(cache.read_B, piece_BU.shape[1])
                hidden_BD = decode_block(self, piece_BU, cache, new_B)[:, -1]
            else:
                new_B = (lengths_B - first).clamp(0, piece_BU.shape[1])
                hidden_BD = _last(decode_block(self, piece_BU, cache, new_B), new_B, hidden_BD)
        return hidden_BD

    def _decode_block(
        self, tokens_BU: Int[Tensor, "B U"], cache: Cache, new_B: Int[Tensor, " B"]
    ) -> Float[Tensor, "B U D"]:
        how = cache_slots(cache, new_B, tokens_BU.shape[1])
        angles = self.rotary_angles[
            how.position_BU.clamp(max=len(self.rotary_angles) - 1)
        ]  # a row that has ended may be read on
        x_BUD = self.embedding(tokens_BU)
        for block, ring, thoughts in zip(self._layers(), cache.rings, cache.thoughts, strict=True):
            x_BUD = block.attend_to_past(x_BUD, angles, ring, how)
            x_BUD = block.transform(block.attend_to_thoughts(x_BUD, angles, thoughts))
        cache.read_B.add_(new_B)
        return self.norm(x_BUD)


@cache
def _compiled_decode_step() -> Callable[..., Tensor]:
    return torch.compile(Decoder._decode_block)


def _last(
    hidden_BUD: Float[Tensor, "B U D"], new_B: Int[Tensor, " B"], before_BD: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """The hidden state of each row's last new token; of rows without one what it was before."""
    index_B1D = (new_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden_BUD.shape[-1])
    return hidden_BUD.gather(1, index_B1D)[:, 0].where(new_B[:, None] > 0, before_BD)


def _count(layers: int) -> range:
    return range(1, layers + 1)


def _check_thought_layers(chosen: list[int] | None, layers: int) -> tuple[int, ...]:
    thought_layers = tuple(_count(layers) if chosen is None else sorted(set(chosen)))
    if not thought_layers or not 1 <= thought_layers[0] <= thought_layers[-1] <= layers:
        raise UsageError(f"The decoder's thought_layers are some of its {layers} layers, counted from 1, got {chosen}.")
    return thought_layers


def _check_heads(width: int, heads: int, kv_heads: int) -> None:
    if min(width, heads, kv_heads) < 1:
        raise UsageError(f"Width, heads and kv_heads must be at least 1, got {width}, {heads} and {kv_heads}.")
    if width % (2 * heads):
        raise UsageError(f"Width {width} is not a multiple of 2 x heads = {2 * heads}: change `width` or `heads`.")
    if heads % kv_heads:
        raise UsageError(f"kv_heads {kv_heads} does not divide heads {heads}: choose a divisor for `kv_heads`.")
