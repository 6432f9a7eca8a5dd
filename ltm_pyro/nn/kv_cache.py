"""Key/value cache for incremental decoding: keys and values of each row's last tokens, and of its thoughts.

Every row has its own number of tokens, so that prompts of different lengths can share a batch.
Shapes: B rows, G key and value heads, U new tokens, W window, M = 2W slots, C channels of a head.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ltm_pyro.nn.attention import KeysValues, ThoughtKV


class Cache(NamedTuple):
    """The keys and values of a row's token at position p are in slot p mod M of every layer's ring buffer.

    With M = 2W, up to W new tokens can be added while the W tokens before them, to which they attend, are kept.
    ``thoughts`` are the keys and values of z, computed once; None for a layer without thoughts. ``read_B`` is each
    row's number of tokens so far.
    """

    thoughts: list[ThoughtKV | None]
    rings: list[KeysValues]
    read_B: Int[Tensor, " B"]

    @property
    def window(self) -> int:
        """W."""
        return self.rings[0].keys_BGMC.shape[2] // 2

    def select(self, index_b: Int[Tensor, " b"]) -> "Cache":
        """A copy of the rows at the given indices, in that order; a row may occur several times."""
        thoughts = [x and x.select(index_b) for x in self.thoughts]
        return Cache(thoughts, [x.select(index_b) for x in self.rings], self.read_B[index_b])


class CacheSlots(NamedTuple):
    """Positions of the next tokens of every row, the cache slots they are written to, and the slots masked for them."""

    position_BU: Int[Tensor, "B U"]
    slot_BU: Int[Tensor, "B U"]
    masked_BUM: Bool[Tensor, "B U M"]

    def write(self, ring_BGMC: Tensor, new_BGUC: Tensor) -> None:
        """Writes the new tokens' keys or values into the ring buffer in place, over the oldest ones."""
        ring_BGMC.scatter_(2, self.slot_BU[:, None, :, None].expand_as(new_BGUC), new_BGUC.to(ring_BGMC.dtype))


def cache_slots(cache: Cache, new_B: Int[Tensor, " B"], tokens: int) -> CacheSlots:
    """The slots of the next ``tokens`` ≤ W tokens per row, of which the first ``new_B`` are the row's own.

    The others are padding. Their keys and values are written as well, but into slots of tokens more than W positions
    ago, to which no later token attends.
    """
    window, slots = cache.window, 2 * cache.window
    position_BU = cache.read_B[:, None] + torch.arange(tokens, device=new_B.device)
    last_B1 = (cache.read_B + new_B - 1)[:, None]
    position_BM = last_B1 - (last_B1 - torch.arange(slots, device=new_B.device)) % slots  # negative: the slot is empty
    distance_BUM = position_BU[:, :, None] - position_BM[:, None]
    attended_BU1 = (position_BU + 1).clamp(max=window)[:, :, None]  # how many tokens each one attends to
    return CacheSlots(position_BU, position_BU % slots, (distance_BUM < 0) | (distance_BUM >= attended_BU1))
