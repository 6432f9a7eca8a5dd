"""What a decoder remembers while it writes: keys and values of each row's last tokens, and of its thoughts.

Rows read at their own pace: each has its own count of tokens, so prompts of different lengths share a batch.
Shapes: B rows, G key and value heads, U new tokens, W window, M = 2W slots, C channels of a head.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ltm_pyro.nn.attention import KeysValues, ThoughtKV


class Cache(NamedTuple):
    """A row's token at position p has its keys and values in slot p mod M of every layer's ring.

    So W tokens are remembered while up to W new ones, which still see them, come in. ``thoughts`` is what z left,
    computed once; None in a layer that hears none. ``read_B`` counts the tokens read.
    """

    thoughts: list[ThoughtKV | None]
    rings: list[KeysValues]
    read_B: Int[Tensor, " B"]

    @property
    def window(self) -> int:
        """W."""
        return self.rings[0].keys_BGMC.shape[2] // 2

    def select(self, index_b: Int[Tensor, " b"]) -> "Cache":
        """A copy of some rows, in any order, each as often as asked for."""
        thoughts = [x and x.select(index_b) for x in self.thoughts]
        return Cache(thoughts, [x.select(index_b) for x in self.rings], self.read_B[index_b])


class CacheSlots(NamedTuple):
    """How the next tokens of every row are read: where they stand, where their traces go, what they do not see."""

    position_BU: Int[Tensor, "B U"]
    slot_BU: Int[Tensor, "B U"]
    hidden_BUM: Bool[Tensor, "B U M"]

    def write(self, ring_BGMC: Tensor, new_BGUC: Tensor) -> None:
        """Puts the new tokens' traces into the ring, in place, over the oldest ones."""
        ring_BGMC.scatter_(2, self.slot_BU[:, None, :, None].expand_as(new_BGUC), new_BGUC.to(ring_BGMC.dtype))


def cache_slots(cache: Cache, new_B: Int[Tensor, " B"], tokens: int) -> CacheSlots:
    """For the next ``new_B`` of ``tokens`` ≤ W tokens per row.

    What follows a row's own is padding. Its traces lie where no token to come looks: the slot is then that of a token
    more than W positions ago.
    """
    window, slots = cache.window, 2 * cache.window
    position_BU = cache.read_B[:, None] + torch.arange(tokens, device=new_B.device)
    last_B1 = (cache.read_B + new_B - 1)[:, None]
    position_BM = last_B1 - (last_B1 - torch.arange(slots, device=new_B.device)) % slots  # below 0 where none is yet
    distance_BUM = position_BU[:, :, None] - position_BM[:, None]
    seen_BU1 = (position_BU + 1).clamp(max=window)[:, :, None]
    return CacheSlots(position_BU, position_BU % slots, (distance_BUM < 0) | (distance_BUM >= seen_BU1))
