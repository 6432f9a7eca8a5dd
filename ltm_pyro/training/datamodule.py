"""The Lightning data module: batches of a packed corpus, the same for any number of workers."""

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
from jaxtyping import Int
from torch.utils.data import DataLoader

from ltm_pyro.data import PackedDataset, read_manifest
from ltm_pyro.data.batch_sampler import ResumableSampler
from ltm_pyro.data.dataset import BatchDataset, Observed, Scored
from ltm_pyro.data.shards import read_lengths
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.processes import end_with_parent

BATCH_SIZE = 32  # where a recipe names neither this nor a budget of tokens


class _Damage(NamedTuple):
    """The numbers of a split's damaged shards, and the tokens of its rows if the file that has them is damaged."""

    shards: set[int] = set()
    lengths_N: Int[np.ndarray, " N"] | None = None


class PackedData(pl.LightningDataModule):
    """Batches of a packed corpus (``ltm data pack``), in an order that the sampler fixes for every epoch.

    Rows of documents are batched with others of like length (`TokenBudgetSampler`), those of a stream are all equally
    long (`DistributedBatchSampler`).

    Args:
        directory: the packed data, a folder or an address (https://, s3://, gs://).
        batch_size: B, sequences per step and rank; of documents, as many as would fill B rows of full length. 32 if
            neither it nor ``tokens`` is given.
        tokens: the most tokens per step and rank, with padding, instead of ``batch_size``.
        score: what is scored of a document that has a prompt: ``all`` of it, or its ``completion``.
        observe: what q is fitted to: ``all`` of the document, or its ``prompt``.
        workers: DataLoader worker processes, which prefetch batches; 0 reads in the training process.
        on_damage: ``stop`` at the first file that differs from the manifest, or check all shards of train and val
            before training and ``skip`` those.
        cache: a folder for copies of shards that are read from an address.
        seed: random seed of the order.
    """

    def __init__(
        self,
        directory: str,
        batch_size: int | None = None,
        tokens: int | None = None,
        score: Scored = "all",
        observe: Observed = "all",
        workers: int = 0,
        on_damage: Literal["stop", "skip"] = "stop",
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None and tokens is not None:
            raise UsageError(
                f"`data.batch_size` is {batch_size} and `data.tokens` is {tokens}, and both say how large a step is: "
                f"set one of them to null."
            )
        batch_size = BATCH_SIZE if batch_size is None else batch_size
        if batch_size < 1 or workers < 0:
            raise UsageError(f"`data` needs batch_size ≥ 1 and workers ≥ 0, got {batch_size} and {workers}.")
        most = max(64, 8 * (os.cpu_count() or 1))
        if workers > most or batch_size >= 2**31:
            raise UsageError(
                f"`data` has batch_size {batch_size} and {workers} workers: give at most {2**31 - 1} and {most}."
            )
        if tokens is not None and tokens < 1:
            raise UsageError(f"`data.tokens` is {tokens}: give a budget of at least 1, or leave it out.")
        self.directory, self.batch_size, self.workers, self.seed = directory, batch_size, workers, seed
        self.tokens, self.score, self.observe = tokens, score, observe
        self.on_damage, self.cache = on_damage, Path(cache) if cache else None
        self._damage: dict[str, _Damage] = {}  # by split; empty unless damage is skipped
        self._position = (0, 0)  # epoch and step from which a training is resumed

    @property
    def sequences(self) -> int:
        """The number of training sequences."""
        return read_manifest(self.directory).splits["train"].sequences

    @cached_property
    def _ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks; (0, 1) without a trainer."""
        trainer: Any = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def setup(self, stage: str) -> None:
        """With ``on_damage: skip`` the first rank reads all shards of train and val, and tells the others of damage."""
        if self.on_damage == "skip" and stage == "fit":
            splits = [name for name in ("train", "val") if name in read_manifest(self.directory).splits]
            found: dict[str, _Damage] = {}
            if self._ranks[0] == 0:
                found = {name: self._find_damage(name) for name in splits}
            self._damage = self.trainer.strategy.broadcast(found) if self.trainer else found

    def _find_damage(self, name: str) -> "_Damage":
        """Reads a split; warns of damage, and refuses a split of which nothing is left."""
        dataset, problems = self._open(name), {}
        split = dataset.manifest.split(name, self.directory)
        lengths_N = np.ones(split.sequences, np.int64)
        for number, ids in enumerate(dataset.ranges()):
            try:
                lengths_N[ids.start : ids.stop] = dataset.read_shard(number).lengths_N
            except UsageError as error:
                problems[number] = str(error)
        if len(problems) == len(dataset.shards):
            raise UsageError(f"all {name} shards of {self.directory} are damaged: {problems[0]}")
        if problems:
            lost, first = sum(dataset.shards[number].sequences for number in problems), next(iter(problems.values()))
            names = ", ".join(dataset.shards[number].file for number in problems)
            count = (
                f"{len(problems)} of {len(dataset.shards)} {name} shards skipped, {lost} of {len(dataset)} sequences"
            )
            warnings.warn(f"{count} ({names}): {first}", stacklevel=2)
        if split.lengths:
            try:
                read_lengths(self.directory, name, split, dataset.manifest.seq_len)
            except UsageError as error:
                warnings.warn(f"the lengths of rows are taken from the {name} shards, because {error}", stacklevel=2)
                return _Damage({*problems}, lengths_N)
        return _Damage({*problems})

    def _open(self, split: str) -> PackedDataset:
        return PackedDataset.open(self.directory, split, self.cache, self.score, self.observe)

    def _order(self, split: str, shuffle: bool) -> tuple[PackedDataset, ResumableSampler[Any]]:
        """A split without damaged shards, and their order on this rank; what is not trained on may come twice."""
        dataset, (rank, ranks), damage = self._open(split), self._ranks, self._damage.get(split, _Damage())
        sound = [ids for number, ids in enumerate(dataset.ranges()) if number not in damage.shards]
        if not shuffle and sum(map(len, sound)) < ranks:
            rank, ranks = 0, 1
        settings = (self.batch_size, self.tokens, rank, ranks, self.seed, shuffle)
        return dataset, dataset.sampler(*settings, shards=sound, lengths_N=damage.lengths_N)

    def train_dataloader(self) -> DataLoader[Any]:
        """Every training sequence once an epoch."""
        dataset, order = self._order("train", shuffle=True)
        order.resume(*self._position)
        return DataLoader(
            BatchDataset(dataset),
            batch_size=None,
            sampler=order,
            num_workers=self.workers,
            worker_init_fn=end_with_parent,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out sequence once; if there are fewer than ranks, all of them on every rank."""
        dataset, order = self._order("val", shuffle=False)
        return DataLoader(BatchDataset(dataset), batch_size=None, sampler=order)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data after the last finished batch."""
        trainer: Any = self.trainer
        loop = trainer.fit_loop
        epoch, step = divmod(loop.epoch_loop.batch_progress.total.processed, int(loop.max_batches))
        steps = {"steps_per_epoch": len(trainer.train_dataloader), **self._skipped_shards()}
        return {"epoch": epoch, "step": step, **steps, **self._identity(self._ranks[1])}

    def _skipped_shards(self) -> dict[str, list[int]]:
        keys = {"skipped_shards": "train", "skipped_val_shards": "val"}
        return {key: sorted(self._damage.get(split, _Damage()).shards) for key, split in keys.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the next batch."""
        self.check(state, self._ranks[1])
        _, order = self._order("train", shuffle=True)
        now = {"steps_per_epoch": len(order), **self._skipped_shards()}
        for name, value in now.items():
            if state.get(name, value) != value:  # earlier checkpoints do not have them
                what = "some sequences would come twice, others never"
                if name == "skipped_val_shards":
                    what = "the held-out figures before and after would be of different texts"
                raise UsageError(
                    f"The checkpoint was trained with {name.replace('_', ' ')} {state[name]}, but now it is {value}: "
                    f"{what}. Resume with the same data, ranks and settings."
                )
        self._position = state["epoch"], state["step"]

    def check(self, state: dict[str, Any], ranks: int) -> None:
        """Refuses to resume with other data, or another global batch size, than a checkpoint was trained with."""
        for name, now in self._identity(ranks).items():
            if state.get(name) != now:
                raise UsageError(
                    f"The checkpoint was trained with {name.replace('_', ' ')} {state.get(name)}, but now it is {now}: "
                    f"resume with the same data and ranks x batch_size, or begin a new run."
                )

    def _identity(self, ranks: int) -> dict[str, int]:
        if self.tokens is None:
            return {"sequences": self.sequences, "global_batch": self.batch_size * ranks}
        return {"sequences": self.sequences, "global_tokens": self.tokens * ranks}
