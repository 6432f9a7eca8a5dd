"""The order of the sequences: fixed by random seed and epoch, divided among ranks, resumable at any batch."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from ltm_pyro.errors import UsageError

MIXED = 16  # shards that are shuffled together, and so are in memory together


class DistributedBatchSampler(Sampler[list[int]]):
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
        self.epoch = self.start = 0
        self.sequences, self.whole = sum(map(len, shards)), batch_size * ranks
        if self.sequences < self.whole:
            raise UsageError(
                f"There are {self.sequences} sequences, fewer than {ranks} ranks x batch_size {batch_size}: "
                f"lower batch_size, or pack more text or with a smaller --seq-len."
            )

    def __len__(self) -> int:
        """Steps of a whole epoch, also if it is resumed in its middle."""
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

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first step of an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, step: int) -> None:
        """Continues at one step of an epoch."""
        self.epoch, self.start = (epoch, step) if step < len(self) else (epoch + 1, 0)

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
