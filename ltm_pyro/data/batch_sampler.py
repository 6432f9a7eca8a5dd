"""The order of the sequences: fixed by random seed and epoch, divided among ranks, resumable at any batch.

Shapes: N sequences.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from ltm_pyro.errors import UsageError

MIXED = 16  # shards that are shuffled together, and so are in memory together


Step = TypeVar("Step")


class ResumableSampler(Sampler[Step]):
    """The steps of one rank, one epoch per iteration, from step ``start`` of ``epoch`` on."""

    epoch = start = 0

    @abstractmethod
    def __len__(self) -> int:
        """Steps of a whole epoch, also if it is resumed in its middle."""

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first step of an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, step: int) -> None:
        """Continues at one step of an epoch."""
        self.epoch, self.start = (epoch, step) if step < len(self) else (epoch + 1, 0)


class DistributedBatchSampler(ResumableSampler[list[int]]):
    """The ids of one rank's batches, one epoch per iteration; every sequence appears once per epoch, on one rank.

    In each step all ranks together take the same R · B ids for every R, and all ranks have equally many steps. The last
    step takes the remaining sequences; if they are fewer than R, the step before it takes them, and its batches have up
    to one sequence more. Each epoch has its own order of shards, and rows are shuffled among `MIXED` of them. The order
    does not depend on the number of worker processes.

    Args:
        shards: the ids of each shard.
        batch_size: B, sequences per rank and step.
        rank: from 0 to R − 1.
        ranks: R.
        seed: the random seed of the order.
        shuffle: if False, the ids come in ascending order.
    """

    def __init__(
        self,
        shards: Sequence[range],
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.shards, self.rank, self.ranks, self.seed, self.shuffle = shards, rank, ranks, seed, shuffle
        self.sequences, self.whole = sum(map(len, shards)), batch_size * ranks
        if self.sequences < self.whole:
            raise UsageError(
                f"There are {self.sequences} sequences, fewer than {ranks} ranks x batch_size {batch_size}: "
                f"lower batch_size, or pack more text or with a smaller --seq-len."
            )

    def __len__(self) -> int:
        full, rest = divmod(self.sequences, self.whole)
        return full + (rest >= self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches from step ``start`` on."""
        pending, step = np.empty(0, np.int64), self.start
        for ids in self._ids(self.start * self.whole):
            pending = np.concatenate([pending, ids])
            while step < len(self) - 1 and len(pending) >= self.whole:
                yield pending[: self.whole][self.rank :: self.ranks].tolist()
                pending, step = pending[self.whole :], step + 1
        if step < len(self):
            yield pending[self.rank :: self.ranks].tolist()

    def _ids(self, first: int) -> Iterator[Int[np.ndarray, " N"]]:
        """The epoch's ids from a position on, one group of shards at a time."""
        for number, shards in enumerate(self._groups()):
            size = sum(map(len, shards))
            if first < size:
                ids = np.concatenate([np.arange(s.start, s.stop) for s in shards])
                if self.shuffle:
                    np.random.default_rng((self.seed, self.epoch, number)).shuffle(ids)
                yield ids[first:]
            first = max(first - size, 0)

    def _groups(self) -> list[list[range]]:
        count = len(self.shards)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(count) if self.shuffle else np.arange(count)
        return [[self.shards[i] for i in group] for group in np.array_split(order, -(-count // MIXED))]


class PaddedIds(NamedTuple):
    """The ids of a batch, and the length that its rows are padded to, on every rank alike."""

    ids: list[int]
    length: int


class TokenBudgetSampler(ResumableSampler[PaddedIds]):
    """Batches of like length, of at most R · ``tokens`` tokens with padding in a step of all ranks.

    Every sequence appears once per epoch, on one rank; all ranks have equally many steps, and each step has at least
    one sequence for every rank (for which the last step of a group may exceed the budget by up to R − 1 sequences).
    Lengths are rounded up to `bounds`, a tenth apart, so that a batch whose sequences have one bound is padded by a
    tenth at most; where lengths change within a batch, and that is often in a small corpus, by more. Shards are mixed
    `MIXED` at a time, in groups that ``seed`` fixes: the number of batches is then the same in every epoch. The order
    does not depend on the number of worker processes.

    Args:
        shards: the ids of each shard.
        lengths_N: the tokens of every sequence of the split, by id.
        tokens: the budget.
        longest: the most tokens that a sequence may have.
        rank: from 0 to R − 1.
        ranks: R.
        seed: the random seed of the order.
        shuffle: if False, the longest come first.
    """

    def __init__(
        self,
        shards: Sequence[range],
        lengths_N: Int[np.ndarray, " N"],
        tokens: int,
        longest: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if tokens < longest:
            raise UsageError(f"A budget of {tokens} tokens has no room for a sequence of {longest}: raise data.tokens.")
        self.rank, self.ranks, self.seed, self.shuffle, self._tokens = rank, ranks, seed, shuffle, tokens
        self.sequences = sum(map(len, shards))
        if self.sequences < ranks:
            raise UsageError(f"There are {self.sequences} sequences, fewer than {ranks} ranks: pack more text.")
        self._bounds = bounds(longest)
        bucket_N = np.searchsorted(self._bounds, lengths_N).astype(np.int16)
        order = np.random.default_rng(seed).permutation(len(shards)) if shuffle else np.arange(len(shards))
        self._groups: list[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]] = []  # ids and their buckets
        for number in range(0, len(shards), MIXED):
            ids = np.concatenate([np.arange(shards[i].start, shards[i].stop) for i in order[number : number + MIXED]])
            if self._groups and min(len(ids), len(self._groups[-1][0])) < ranks:
                ids = np.concatenate([self._groups.pop()[0], ids])
            self._groups.append((ids, bucket_N[ids]))
        self._cuts = [self._cut(np.sort(bucket_n)[::-1]) for _, bucket_n in self._groups]

    def __len__(self) -> int:
        return sum(len(cuts) for cuts in self._cuts)

    def __iter__(self) -> Iterator[PaddedIds]:
        """This rank's batches from step ``start`` on."""
        order = np.arange(len(self._groups))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        skipped = self.start
        for number in order.tolist():
            (ids, bucket_n), cuts = self._groups[number], self._cuts[number]
            if skipped >= len(cuts):
                skipped -= len(cuts)
                continue
            batches = np.arange(len(cuts))
            if self.shuffle:
                rng = np.random.default_rng((self.seed, self.epoch, number))
                mixed, batches = rng.permutation(len(ids)), rng.permutation(batches)
                ids, bucket_n = ids[mixed], bucket_n[mixed]
            ids = ids[np.argsort(-bucket_n, kind="stable")]
            for batch in batches[skipped:].tolist():
                first, last, length = cuts[batch]
                yield PaddedIds(ids[first:last][self.rank :: self.ranks].tolist(), length)
            skipped = 0

    def _cut(self, bucket_n: Int[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
        """First, last and length of each batch of a group that is sorted from the longest to the shortest."""
        cuts, first = [], 0
        while first < len(bucket_n):
            length = int(self._bounds[bucket_n[first]])
            last = min(first + max(self._tokens * self.ranks // length, self.ranks), len(bucket_n))
            if len(bucket_n) - last < self.ranks:  # too few for a batch of their own
                last = len(bucket_n)
            cuts.append((first, last, length))
            first = last
        return cuts


def bounds(longest: int) -> Int[np.ndarray, " n"]:
    """Lengths up to ``longest``, each about a tenth below the next, ascending."""
    found = [longest]
    while found[-1] > 1:
        found.append(min(found[-1] - 1, int(found[-1] / 1.1)))
    return np.array(found[::-1])
