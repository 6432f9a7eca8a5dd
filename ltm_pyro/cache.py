"""What a decoder remembers while it writes: keys and values of each row's last W tokens, and of its thoughts.

Rows read at their own pace: each has its own count of tokens, so prompts of different lengths share a batch.
Shapes: B rows, G key and value heads, U new tokens, W window, M = W + U, C channels of a head.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ltm_pyro.attention import KeysValues, ThoughtMemory


class Cache(NamedTuple):
    """A row's token at position p has its keys and values in slot p mod W of every layer's ring.

    ``thoughts`` is what z left, computed once; None in a layer that hears none. ``read_B`` counts the tokens read.
    """

    thoughts: list[ThoughtMemory | None]
    rings: list[KeysValues]
    read_B: Int[Tensor, " B"]

    @property
    def window(self) -> int:
        """W."""
        return self.rings[0].keys_BGMC.shape[2]

    def select(self, index_b: Int[Tensor, " b"]) -> "Cache":
        """A copy of some rows, in any order, each as often as asked for."""
        thoughts = [x and x.select(index_b) for x in self.thoughts]
        return Cache(thoughts, [x.select(index_b) for x in self.rings], self.read_B[index_b])


class Reading(NamedTuple):
    """How the next tokens of every row are read: where they stand, what they see, where their traces go."""

    position_BU: Int[Tensor, "B U"]
    mask_BUM: Bool[Tensor, "B U M"]  # the ring's slots, then the new tokens
    slot_BU: Int[Tensor, "B U"]
    real_BU: Bool[Tensor, "B U"]  # False behind a row's last new token

    def write(self, ring_BGWC: Tensor, new_BGUC: Tensor) -> None:
        """Puts the new tokens' traces into the ring, in place, over the oldest ones."""
        slot = self.slot_BU[:, None, :, None].expand_as(new_BGUC)
        kept = ring_BGWC.gather(2, slot)
        ring_BGWC.scatter_(2, slot, new_BGUC.to(ring_BGWC.dtype).where(self.real_BU[:, None, :, None], kept))


def reading(cache: Cache, new_B: Int[Tensor, " B"], tokens: int) -> Reading:
    """For the next ``new_B`` of ``tokens`` ≤ W tokens per row; what follows a row's own is padding."""
    window, read_B11 = cache.window, cache.read_B[:, None, None]
    ahead_U = torch.arange(tokens, device=new_B.device)
    slot_W = torch.arange(window, device=new_B.device)
    age_B1W = (read_B11 - 1 - slot_W) % window  # 0 is the last token read
    old_BUW = (age_B1W < read_B11) & (ahead_U[:, None] + 1 + age_B1W < window)
    new_UU = (ahead_U[:, None] >= ahead_U).expand(len(new_B), -1, -1)
    position_BU = cache.read_B[:, None] + ahead_U
    mask_BUM = torch.cat([old_BUW, new_UU], dim=-1)
    return Reading(position_BU, mask_BUM, position_BU % window, ahead_U < new_B[:, None])
