"""The network of p_β(x | z): a causal Transformer whose layers attend to thoughts of their own. No sampling inside.

Shapes: B sequences, T tokens, L layers, K thoughts per layer, D width, S particles. Leading axes of z are free.
"""

from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.models.block import Block
from ltm_pyro.models.cached_decoding import CachedDecoding
from ltm_pyro.nn.attention import ThoughtKV
from ltm_pyro.nn.layers import RotaryAngles, rotation
from ltm_pyro.nn.rms_norm import RMSNorm


class Decoder(CachedDecoding):
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
        thought_layers: the layers that attend to thoughts, counted from 1; all when not given. What lies below the
            first of them is computed once per batch, not once per fast step. The L of z counts these layers.
        kv_heads: key and value heads, a divisor of ``heads`` (grouped attention); ``heads`` when not given.
        zero_init_cross_attention: the cross-attention's output starts at zero, so that thoughts can be added to a
            decoder trained without them: the first bound then equals the autoregressive loss.
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
        widths = [self.thought_shape.width if thoughts and n in self.thought_layers else None for n in _numbers(layers)]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, window, one, attention) for one in widths)
        self.norm = RMSNorm(width)
        rotary_angles = rotation(torch.arange(max(length, thoughts)), width // heads)
        self.register_buffer("rotary_angles", rotary_angles, persistent=False)
        self._initialise(layers, zero_init_cross_attention)

    def stem(self, inputs_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings, and what follows up to the self-attention of the first layer that attends to thoughts."""
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
        for block in self.layer_list[:first]:
            x_BTD = self._run_block(block, x_BTD, angles, None, False)
        return self.layer_list[first].attend_to_tokens(x_BTD, angles)

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"] | None
    ) -> Float[Tensor, "... B T D"]:
        """The last hidden states, for every particle of z; without cross-attention if z is None."""
        lead = () if z_BLKD is None else z_BLKD.shape[:-4]
        x_BTD = stem_BTD.expand(*lead, *stem_BTD.shape).flatten(0, len(lead))
        thoughts = self.thought_kv(None if z_BLKD is None else z_BLKD.flatten(0, len(lead)))
        angles, first = self.rotary_angles[: stem_BTD.shape[1]], self.thought_layers[0] - 1
        for index, (block, kv) in enumerate(zip(self.layer_list[first:], thoughts[first:], strict=True)):
            x_BTD = self._run_block(block, x_BTD, angles, kv, index == 0)
        return self.norm(x_BTD).unflatten(0, (*lead, -1)) if lead else self.norm(x_BTD)

    def logits(self, hidden_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Unnormalised log-probabilities of all tokens: hidden · embeddingᵀ."""
        return F.linear(hidden_BTD, self.embedding.weight)

    def _run_block(
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

    def _initialise(self, layers: int, zero_init_cross_attention: bool) -> None:
        """N(0, 1 / fan-in); what is added to the residual stream is smaller by √(2L), as in GPT-2.

        At small widths GPT-2's fixed 0.02 is far too small: a decoder of width 64 stood at 5.3 nats per token after
        250 steps with it, at 4.6 with this rule and the rate it allows. With ``zero_init_cross_attention`` the
        cross-attention adds exactly nothing at first.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)
            if zero_init_cross_attention and name.endswith("cross_attention.output.weight"):
                nn.init.zeros_(weight)


def _numbers(layers: int) -> range:
    return range(1, layers + 1)


def _check_thought_layers(chosen: list[int] | None, layers: int) -> tuple[int, ...]:
    numbers = tuple(_numbers(layers) if chosen is None else sorted(set(chosen)))
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= layers:
        raise UsageError(f"The decoder's thought_layers are some of its {layers} layers, counted from 1, got {chosen}.")
    return numbers


def _check_heads(width: int, heads: int, kv_heads: int) -> None:
    if min(width, heads, kv_heads) < 1:
        raise UsageError(f"Width, heads and kv_heads must be at least 1, got {width}, {heads} and {kv_heads}.")
    if width % (2 * heads):
        raise UsageError(f"Width {width} is not a multiple of 2 x heads = {2 * heads}: change `width` or `heads`.")
    if heads % kv_heads:
        raise UsageError(f"kv_heads {kv_heads} does not divide heads {heads}: choose a divisor for `kv_heads`.")
