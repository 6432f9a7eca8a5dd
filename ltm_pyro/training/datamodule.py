"""The Lightning data module: batches of a packed corpus, the same for any number of workers."""

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ltm_pyro.data import PackedDataset, read_manifest
from ltm_pyro.data.batch_sampler import ResumableSampler
from ltm_pyro.data.dataset import BatchDataset, Observed, Scored
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.processes import end_with_parent


class PackedData(pl.LightningDataModule):
    """Batches of a packed corpus (``ltm data pack``), in an order that the sampler fixes for every epoch.

    Rows of documents are batched with others of like length (`TokenBudgetSampler`), those of a stream are all equally
    long (`DistributedBatchSampler`).

    Args:
        directory: the packed data, a folder or an address (https://, s3://, gs://).
        batch_size: B, sequences per step and rank; of documents, as many as would fill B rows of full length.
        tokens: the most tokens per step and rank, with padding, instead of ``batch_size``.
        score: what is scored of a document that has a prompt: ``all`` of it, or its ``completion``.
        observe: what q is fitted to: ``all`` of the document, or its ``prompt``.
        workers: DataLoader worker processes, which prefetch batches; 0 reads in the training process.
        on_damage: ``stop`` at the first shard that differs from the manifest, or check all of them before training and
            ``skip`` those.
        cache: a folder for copies of shards that are read from an address.
        seed: random seed of the order.
    """

    def __init__(
        self,
        directory: str,
        batch_size: int = 32,
        tokens: int | None = None,
        score: Scored = "all",
        observe: Observed = "all",
        workers: int = 0,
        on_damage: Literal["stop", "skip"] = "stop",
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
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
        self._skipped: set[int] = set()  # numbers of damaged shards
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
        """With ``on_damage: skip`` the first rank reads every training shard, and tells the others which to skip."""
        if self.on_damage == "skip" and stage == "fit":
            problems = self._problems() if self._ranks[0] == 0 else {}
            self._skipped = set(self.trainer.strategy.broadcast(problems) if self.trainer else problems)

    def _problems(self) -> dict[int, str]:
        """What is wrong with damaged shards, by number; warns of them, and refuses data of which nothing is left."""
        dataset, problems = self._open("train"), {}
        for number in range(len(dataset.shards)):
            try:
                dataset.read_shard(number)
            except UsageError as error:
                problems[number] = str(error)
        if len(problems) == len(dataset.shards):
            raise UsageError(f"all shards of {self.directory} are damaged: {problems[0]}")
        if problems:
            lost, first = sum(dataset.shards[number].sequences for number in problems), next(iter(problems.values()))
            names = ", ".join(dataset.shards[number].file for number in problems)
            count = f"{len(problems)} of {len(dataset.shards)} shards skipped, {lost} of {len(dataset)} sequences"
            warnings.warn(f"{count} ({names}): {first}", stacklevel=2)
        return problems

    def _open(self, split: str) -> PackedDataset:
        return PackedDataset.open(self.directory, split, self.cache, self.score, self.observe)

    def _train_order(self) -> tuple[PackedDataset, ResumableSampler[Any]]:
        """The training data without damaged shards, and their order on this rank."""
        dataset, (rank, ranks) = self._open("train"), self._ranks
        sound = [ids for number, ids in enumerate(dataset.ranges()) if number not in self._skipped]
        return dataset, dataset.sampler(self.batch_size, self.tokens, rank, ranks, self.seed, shards=sound)

    def train_dataloader(self) -> DataLoader[Any]:
        """Every training sequence once an epoch."""
        dataset, order = self._train_order()
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
        dataset = self._open("val")
        rank, ranks = self._ranks if len(dataset) >= self._ranks[1] else (0, 1)
        order = dataset.sampler(self.batch_size, self.tokens, rank, ranks, self.seed, shuffle=False)
        return DataLoader(BatchDataset(dataset), batch_size=None, sampler=order)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data after the last finished batch."""
        trainer: Any = self.trainer
        loop = trainer.fit_loop
        epoch, step = divmod(loop.epoch_loop.batch_progress.total.processed, int(loop.max_batches))
        steps = {"steps_per_epoch": len(trainer.train_dataloader), "skipped_shards": sorted(self._skipped)}
        return {"epoch": epoch, "step": step, **steps, **self._identity(self._ranks[1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the next batch."""
        self.check(state, self._ranks[1])
        _, order = self._train_order()
        now = {"steps_per_epoch": len(order), "skipped_shards": sorted(self._skipped)}
        for name, value in now.items():
            if state.get(name, value) != value:  # earlier checkpoints do not have them
                raise UsageError(
                    f"The checkpoint was trained with {name.replace('_', ' ')} {state[name]}, but now it is {value}: "
                    f"some sequences would come twice, others never. Resume with the same data, ranks and settings."
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
