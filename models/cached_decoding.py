"""Incremental decoding with a key/value cache: how a decoder writes token after token at a constant cost.

Shapes: B rows, T new tokens, U of them at a time (at most the window W), L layers, K thoughts, D width.
"""

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ltm_pyro.models.block import Block
from ltm_pyro.nn.attention import KeysValues, ThoughtKV
from ltm_pyro.nn.kv_cache import Cache, cache_slots
from ltm_pyro.nn.precision import matrix_dtype


class CachedDecoding(nn.Module):
    """What the decoder's layers do with a cache; the decoder itself is in `ltm_pyro.models.decoder`."""

    blocks: nn.ModuleList
    embedding: nn.Embedding
    norm: nn.Module
    rotary_angles: Tensor
    thought_layers: tuple[int, ...]
    width: int
    window: int

    @property
    def layer_list(self) -> list[Block]:
        """All layers, from the first."""
        return cast(list[Block], list(self.blocks))

    def thought_kv(self, z_BLKD: Float[Tensor, "B L K thought"] | None) -> list[ThoughtKV | None]:
        """Every layer's keys and values of its thoughts; None for a layer without, and for all if z is None."""
        if z_BLKD is None:
            return [None] * len(self.blocks)
        angles, z = self.rotary_angles[: z_BLKD.shape[2]], dict(zip(self.thought_layers, z_BLKD.unbind(1), strict=True))
        return [
            block.cross_attention.project_kv(z[number], angles) if block.cross_attention else None
            for number, block in enumerate(self.layer_list, start=1)
        ]

    def init_cache(self, z_BLKD: Float[Tensor, "B L K thought"]) -> Cache:
        """The cache of B rows with their thoughts and no token yet; see `decode_step`."""
        self_attention = self.layer_list[0].self_attention
        shape = (len(z_BLKD), self_attention.kv_heads, 2 * self.window, self_attention.channels)
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
        """The hidden state behind the last token of every row, from which the next token is predicted.

        A token costs the same at every position: it attends to the cache, and its keys and values are added to it, in
        place.

        Args:
            tokens_BT: each row's next tokens, padded on the right.
            lengths_B: how many of them are a row's own, at least one; T when not given.
            compile: lets torch compile the step of single tokens.
        """
        compiled = compile and tokens_BT.shape[1] == 1
        decode_piece = _compiled_decode_piece() if compiled else CachedDecoding._decode_piece
        hidden_BD = self.embedding.weight.new_zeros(len(tokens_BT), self.width)
        for first, piece_BU in zip(count(0, self.window), tokens_BT.split(self.window, 1)):
            if lengths_B is None:
                new_B = torch.full_like(cache.read_B, piece_BU.shape[1])
                hidden_BD = decode_piece(self, piece_BU, cache, new_B)[:, -1]
            else:
                new_B = (lengths_B - first).clamp(0, piece_BU.shape[1])
                hidden_BD = _last(decode_piece(self, piece_BU, cache, new_B), new_B, hidden_BD)
        return hidden_BD

    def _decode_piece(
        self, tokens_BU: Int[Tensor, "B U"], cache: Cache, new_B: Int[Tensor, " B"]
    ) -> Float[Tensor, "B U D"]:
        slots = cache_slots(cache, new_B, tokens_BU.shape[1])
        position_BU = slots.position_BU.clamp(max=len(self.rotary_angles) - 1)  # a row that has ended may go on
        angles, x_BUD = self.rotary_angles[position_BU], self.embedding(tokens_BU)
        for block, ring, thoughts in zip(self.layer_list, cache.rings, cache.thoughts, strict=True):
            x_BUD = block.attend_to_cache(x_BUD, angles, ring, slots)
            x_BUD = block.transform(block.attend_to_thoughts(x_BUD, angles, thoughts))
        cache.read_B.add_(new_B)
        return self.norm(x_BUD)


@cache
def _compiled_decode_piece() -> Callable[..., Tensor]:
    return torch.compile(CachedDecoding._decode_piece)


def _last(
    hidden_BUD: Float[Tensor, "B U D"], new_B: Int[Tensor, " B"], before_BD: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """The hidden state of each row's last new token; for a row without one what it was before."""
    index_B1D = (new_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden_BUD.shape[-1])
    return hidden_BUD.gather(1, index_B1D)[:, 0].where(new_B[:, None] > 0, before_BD)
