"""The network of masked diffusion: the decoder's trunk with full attention, which sees a text with gaps in it.

Shapes: B sequences (times particles), T tokens, L layers, D width, V vocabulary.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.contracts import ThoughtShape
from ltm_pyro.errors import UsageError
from ltm_pyro.models.block import Block
from ltm_pyro.models.trunk import check_heads, check_size, embed, init_weights
from ltm_pyro.nn.layers import rotation
from ltm_pyro.nn.rms_norm import RMSNorm


class Denoiser(nn.Module):
    r"""The network of :math:`p(x_i \mid x_{\text{visible}})` for every masked token i, all at once.

    The layers are those of `ltm_pyro.models.Decoder` without thoughts and without a causal mask: a token attends to
    all others, before and behind it. A masked token's embedding is one learned vector, and the network is not told how
    many are masked, which it can see (arXiv 2406.07524, section 3.4). Logits are hidden · embeddingᵀ (tied), over the
    V tokens only, so that no token is ever predicted to be a mask.

    Args:
        vocabulary: V.
        layers, width, heads: L, D and the number of query heads; D is a multiple of 2 · ``heads``.
        length: the maximum T.
        kv_heads: key and value heads, a divisor of ``heads``; ``heads`` if not given.
        recompute: activation checkpointing, as for `ltm_pyro.models.Decoder`.

    Raises:
        UsageError: sizes that do not fit together.
    """

    half_precision = True  # its matrix products follow autocast
    rotary_angles: Tensor  # of all positions, (length, 1, D / heads / 2, 2)

    def __init__(
        self,
        vocabulary: int,
        layers: int = 3,
        width: int = 512,
        heads: int = 8,
        length: int = 1024,
        kv_heads: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        for name, size in {"vocabulary": vocabulary, "layers": layers, "length": length}.items():
            if size < 1:
                raise UsageError(f"The denoiser's {name} must be at least 1, got {size}.")
        check_size(vocabulary, layers, max(width, 1), length)
        check_heads(width, heads, kv_heads)
        self.vocabulary, self.layers, self.width, self.heads = vocabulary, layers, width, heads
        self.length, self.window = length, None  # full attention
        self.recompute = recompute
        self.thought_layers, self.thought_shape = (*range(1, layers + 1),), ThoughtShape(layers, 0, width)
        self.embedding = nn.Embedding(vocabulary, width)
        self.mask_D = nn.Parameter(torch.randn(width) * width**-0.5)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, None, None, "auto") for _ in range(layers))
        self.norm = RMSNorm(width)
        self.register_buffer("rotary_angles", rotation(torch.arange(length), width // heads), persistent=False)
        init_weights(self, layers)

    def stem(
        self, tokens_BT: Int[Tensor, "B T"], masked_BT: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The embeddings of the visible tokens (`embed`), and the mask's in the place of the others."""
        x_BTD = embed(self.embedding, tokens_BT, self.length)
        return x_BTD if masked_BT is None else torch.where(masked_BT[..., None], self.mask_D.to(x_BTD.dtype), x_BTD)

    def forward(
        self, stem_BTD: Float[Tensor, "B T D"], z_BLKD: None, visible_BT: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """The last hidden states.

        Args:
            z_BLKD: None; there are no thoughts.
            visible_BT: False at padding, which no token attends to.
        """
        x_BTD, angles = stem_BTD, self.rotary_angles[: stem_BTD.shape[1]]
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                again = checkpoint(
                    block, x_BTD, angles, None, visible_BT, use_reentrant=False, preserve_rng_state=False
                )
                x_BTD = cast(Tensor, again)
            else:
                x_BTD = block(x_BTD, angles, None, visible_BT)
        return cast(Tensor, self.norm(x_BTD))

    def logits(self, hidden_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Unnormalised log-probabilities of all tokens: hidden · embeddingᵀ."""
        return F.linear(hidden_BTD, self.embedding.weight)
