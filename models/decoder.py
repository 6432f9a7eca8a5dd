"""The network of p_β(x | z): a causal Transformer, each layer of which attends to its own thoughts. Nothing is sampled.

Shapes: B sequences, T tokens, L layers, K thoughts per layer, D width, V vocabulary. z may have leading axes, such as
particles.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.models.block import Block
from ltm_pyro.models.cached_decoding import CachedDecoding
from ltm_pyro.models.trunk import check_heads, check_size, embed, init_weights
from ltm_pyro.nn.layers import rotation
from ltm_pyro.nn.rms_norm import RMSNorm


class Decoder(CachedDecoding):
    r"""The network of :math:`p_\beta(x \mid z) = \prod_t p_\beta(x_t \mid z, x_{t-W \ldots t-1})`.

    Pre-norm RMSNorm, rotary positions, SwiGLU, no biases; logits are hidden · embeddingᵀ (tied). In each layer a token
    attends to the last ``window`` tokens, itself included, and to the layer's own K thoughts. ``thoughts=0`` is the
    plain autoregressive baseline, without any cross-attention parameters. Source: arXiv 2502.01567, section 2; our
    ``window`` is the paper's k, ``thoughts`` · ``layers`` its N_z.

    Args:
        vocabulary: V.
        layers, width, heads: L, D and the number of query heads; D is a multiple of 2 · ``heads``.
        thoughts: K, thought vectors per layer.
        window: W, the tokens that self-attention covers.
        length: the maximum T.
        thought_width: width of a thought; D if not given.
        thought_layers: the layers that attend to thoughts, counted from 1; all if not given. The layers below the
            first of them are computed once per batch, not once per fast step. The L of z counts these layers only.
        thought_keys: what a token's attention to thoughts goes by. ``content``: keys are computed from z, as in the
            paper. ``learned``: every thought has a learned key and only its value comes from z, so that tokens find
            the same thought in every text.
        position_embeddings: adds a learned embedding of the position to each token's, as GPT-2 does. Rotary positions
            are relative, and a short window does not tell how far a text has come.
        constant_thoughts: learned vectors per layer in the place of thoughts, the same for every text: the same network
            when its thoughts cannot carry anything. It has no latent variable; ``thoughts`` has to be 0.
        kv_heads: key and value heads, a divisor of ``heads`` (grouped-query attention); ``heads`` if not given.
        zero_init_cross_attention: the cross-attention's output starts at zero, so that thoughts can be added to a
            decoder trained without them: the log-likelihood then equals the autoregressive one at first.
        attention: the implementation of self-attention: ``dense``, ``sdpa``, ``xformers`` or ``flex``; ``auto`` selects
            the fastest one that runs on this device (see `ltm_pyro.nn.attention`).
        recompute: activation checkpointing: only the hidden states between layers are stored, the rest is computed
            again in the backward pass. Less memory, a third more computation.

    Raises:
        UsageError: sizes that do not fit together, here; a batch that is too long or on another device, in `stem`.
    """

    half_precision = True  # its matrix products follow autocast
    rotary_angles: Tensor  # of all positions, (max(length, K), 1, D / heads / 2, 2)

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
        thought_keys: Literal["content", "learned"] = "content",
        position_embeddings: bool = False,
        constant_thoughts: int = 0,
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
        if thoughts < 0 or (thought_width or 1) < 1:
            raise UsageError(
                f"The decoder needs thoughts ≥ 0 and thought_width ≥ 1, got {thoughts} and {thought_width}."
            )
        if constant_thoughts < 0 or (constant_thoughts and thoughts):
            raise UsageError(
                f"The decoder's constant_thoughts are in the place of its thoughts, got {constant_thoughts} and "
                f"{thoughts} thoughts: set one of them to 0."
            )
        vectors = thoughts or constant_thoughts
        check_size(vocabulary, layers, max(width, thought_width or 1), max(length, vectors))
        check_heads(width, heads, kv_heads)
        self.vocabulary, self.width, self.heads = vocabulary, width, heads
        self.window, self.length = window, length
        self.recompute = recompute
        self.layers, self.thought_layers = layers, _check_thought_layers(thought_layers, layers)
        self.thought_shape = ThoughtShape(len(self.thought_layers), thoughts, thought_width or width)
        self.constants_LKD: nn.Parameter | None = None
        if constant_thoughts:
            self.constants_LKD = nn.Parameter(torch.randn(self.thought_shape._replace(thoughts=constant_thoughts)))
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width) if position_embeddings else None
        self.blocks = nn.ModuleList()
        for number in range(1, layers + 1):
            attends = vectors > 0 and number in self.thought_layers
            block_thought_width = self.thought_shape.width if attends else None
            learned_keys = vectors if thought_keys == "learned" else 0
            self.blocks.append(Block(width, heads, kv_heads, window, block_thought_width, attention, learned_keys))
        self.norm = RMSNorm(width)
        rotary_angles = rotation(torch.arange(max(length, vectors)), width // heads)
        self.register_buffer("rotary_angles", rotary_angles, persistent=False)
        init_weights(self, layers, zero_init_cross_attention)

    def stem(self, inputs_BT: Int[Tensor, "B T"], start: int = 0) -> Float[Tensor, "B T D"]:
        """The part that z does not enter: all up to the self-attention of the first layer that attends to thoughts.

        Args:
            start: the position of the first token, if it is in the middle of a document.
        """
        x_BTD = embed(self.embedding, inputs_BT, self.length)
        angles, first = self._angles(start, inputs_BT.shape[1]), self.thought_layers[0] - 1
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[start : start + inputs_BT.shape[1]]
        for block in self.layer_list[:first]:
            x_BTD = self._run(block, x_BTD, angles, None)
        return self.layer_list[first].attend_to_tokens(x_BTD, angles)

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: Float[Tensor, "... B L K thought"] | None, start: int = 0
    ) -> Float[Tensor, "... B T D"]:
        """The last hidden states, for all leading axes of z; without cross-attention if z is None.

        Args:
            start: as for `stem`; a token's position counts where it attends to thoughts, which have positions as well.
        """
        lead = () if z_BLKD is None else z_BLKD.shape[:-4]
        x_BTD = stem_BTD.expand(*lead, *stem_BTD.shape).flatten(0, len(lead))
        thoughts = self.thought_kv(None if z_BLKD is None else z_BLKD.flatten(0, len(lead)))
        angles, first = self._angles(start, stem_BTD.shape[1]), self.thought_layers[0] - 1
        x_BTD = self._run(self.layer_list[first].after_self_attention, x_BTD, angles, thoughts[first])
        for block, kv in zip(self.layer_list[first + 1 :], thoughts[first + 1 :], strict=True):
            x_BTD = self._run(block, x_BTD, angles, kv)
        return self.norm(x_BTD).unflatten(0, (*lead, -1)) if lead else self.norm(x_BTD)

    def logits(self, hidden_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Unnormalised log-probabilities of all tokens: hidden · embeddingᵀ."""
        return F.linear(hidden_BTD, self.embedding.weight)

    def _angles(self, start: int, tokens: int) -> Tensor:
        """The rotary angles of positions, also beyond `length`."""
        if start + tokens <= len(self.rotary_angles):
            return self.rotary_angles[start : start + tokens]
        position = torch.arange(start, start + tokens, device=self.rotary_angles.device)
        return rotation(position, self.width // self.heads)

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():  # no random numbers inside, so no random state to preserve
            return cast(Tensor, checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False))
        return layer(*arguments)


def _check_thought_layers(thought_layers: list[int] | None, layers: int) -> tuple[int, ...]:
    numbers = tuple(range(1, layers + 1) if thought_layers is None else sorted(set(thought_layers)))
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= layers:
        raise UsageError(
            f"The decoder's thought_layers are some of its {layers} layers, counted from 1, got {thought_layers}."
        )
    return numbers
