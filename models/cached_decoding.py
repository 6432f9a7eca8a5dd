"""Incremental decoding with a key/value cache: every new token costs the same, however long the text is.

Shapes: B rows, T new tokens, U ≤ W tokens of one chunk, W window, L layers, K thoughts, D width.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ltm_pyro.models.block import Block
from ltm_pyro.nn.attention import KeysValues, ThoughtKV
from ltm_pyro.nn.kv_cache import Cache, cache_slots
from ltm_pyro.nn.precision import matrix_dtype


class CachedDecoding(nn.Module):
    """The methods of a decoder that use a cache; `ltm_pyro.models.decoder.Decoder` sets the attributes below."""

    blocks: nn.ModuleList
    embedding: nn.Embedding
    norm: nn.Module
    rotary_angles: Tensor
    thought_layers: tuple[int, ...]
    constants_LKD: nn.Parameter | None
    positions: nn.Embedding | None
    width: int
    window: int

    @property
    def layer_list(self) -> list[Block]:
        """The layers, first to last, typed for mypy."""
        return cast(list[Block], list(self.blocks))

    def thought_kv(self, z_BLKD: Float[Tensor, "B L K thought"] | None) -> list[ThoughtKV | None]:
        """The keys and values of each layer's thoughts: None for a layer without cross-attention, or if z is None."""
        if z_BLKD is None:
            return [None] * len(self.blocks)
        if self.constants_LKD is not None:
            z_BLKD = self.constants_LKD.expand(len(z_BLKD), -1, -1, -1)
        angles = self.rotary_angles[: z_BLKD.shape[2]]
        z_by_layer = dict(zip(self.thought_layers, z_BLKD.unbind(1), strict=True))
        return [
            block.cross_attention.project_kv(z_by_layer[number], angles) if block.cross_attention else None
            for number, block in enumerate(self.layer_list, start=1)
        ]

    def init_cache(self, z_BLKD: Float[Tensor, "B L K thought"]) -> Cache:
        """The cache of B rows that holds their thoughts and no token yet; see `decode_step`."""
        self_attention = self.layer_list[0].self_attention
        shape = (len(z_BLKD), self_attention.kv_heads, 2 * self.window, self_attention.channels)  # (B, G, M, C)
        empty = z_BLKD.new_zeros(shape, dtype=matrix_dtype(self.embedding.weight))
        rings = [KeysValues(empty.clone(), empty.clone()) for _ in self.blocks]
        read_B = torch.zeros(len(z_BLKD), dtype=torch.long, device=z_BLKD.device)
        return Cache(self.thought_kv(z_BLKD), rings, read_B)

    def decode_step(
        self,
        tokens_BT: Int[Tensor, "B T"],
        cache: Cache,
        lengths_B: Int[Tensor, " B"] | None = None,
        compile: bool = False,
    ) -> Float[Tensor, "B D"]:
        """The hidden state of every row's last token, from which the next token is predicted.

        The new tokens attend to the cache, and their keys and values are added to it in place. At most W tokens fit at
        once, so longer inputs are processed in chunks.

        Args:
            tokens_BT: the next tokens of each row, padded on the right.
            cache: from `init_cache`; updated in place.
            lengths_B: number of tokens of each row without its padding, at least 1; T if not given.
            compile: compiles the step with `torch.compile` if T is 1.
        """
        compiled = compile and tokens_BT.shape[1] == 1
        decode_chunk = _compiled_decode_chunk() if compiled else CachedDecoding._decode_chunk
        hidden_BD = self.embedding.weight.new_zeros(len(tokens_BT), self.width)
        for index, chunk_BU in enumerate(tokens_BT.split(self.window, 1)):
            if lengths_B is None:
                new_B = torch.full_like(cache.read_B, chunk_BU.shape[1])
                hidden_BD = decode_chunk(self, chunk_BU, cache, new_B)[:, -1]
            else:
                new_B = (lengths_B - index * self.window).clamp(0, chunk_BU.shape[1])
                hidden_BD = _at_last_token(decode_chunk(self, chunk_BU, cache, new_B), new_B, hidden_BD)
        return hidden_BD

    def _decode_chunk(
        self, tokens_BU: Int[Tensor, "B U"], cache: Cache, new_B: Int[Tensor, " B"]
    ) -> Float[Tensor, "B U D"]:
        slots = cache_slots(cache, new_B, tokens_BU.shape[1])
        position_BU = slots.position_BU.clamp(max=len(self.rotary_angles) - 1)  # finished rows may go beyond T
        angles, x_BUD = self.rotary_angles[position_BU], self.embedding(tokens_BU)
        if self.positions is not None:
            x_BUD = x_BUD + self.positions(position_BU.clamp(max=self.positions.num_embeddings - 1))
        for block, ring, thoughts in zip(self.layer_list, cache.rings, cache.thoughts, strict=True):
            x_BUD = block.attend_to_cache(x_BUD, angles, ring, slots)
            x_BUD = block.after_self_attention(x_BUD, angles, thoughts)
        cache.read_B.add_(new_B)
        return self.norm(x_BUD)


@cache
def _compiled_decode_chunk() -> Callable[..., Tensor]:
    return torch.compile(CachedDecoding._decode_chunk)


def _at_last_token(
    hidden_BUD: Float[Tensor, "B U D"], new_B: Int[Tensor, " B"], before_BD: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """The hidden state of each row's last new token, or ``before_BD`` for a row without new tokens."""
    index_B1D = (new_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden_BUD.shape[-1])
    return hidden_BUD.gather(1, index_B1D)[:, 0].where(new_B[:, None] > 0, before_BD)
