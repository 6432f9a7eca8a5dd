"""Atomic checkpoints and graceful shutdown: a training can be resumed after its end, a signal or an error."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ltm_pyro.contracts import Batch
from ltm_pyro.errors import UsageError
from ltm_pyro.training.metrics import MetricsFile
from ltm_pyro.utils.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How often a training is saved.

    Args:
        every: steps between two checkpoints.
        keep: how many of the newest are kept: ``last.ckpt``, and earlier ones as ``step-….ckpt``.
    """

    every: int = 500
    keep: int = 1

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UsageError(f"`checkpoints` needs every ≥ 1 and keep ≥ 1, got {self.every} and {self.keep}.")


class LocalFile(TorchCheckpointIO):
    """Writes a checkpoint to the path that it is given.

    Lightning's own would write it to the system's temporary folder first, where a killed training leaves it, and moves
    it from there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the file; an `OSError` if the disk is full, which torch's own writer would not raise."""
        content = BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getbuffer())


class Checkpoints(Checkpoint):
    """Keeps the newest checkpoints, each written atomically: under another name, then renamed.

    One is written every ``saving.every`` steps, at the end, after an error, and on Ctrl-C or SIGTERM after the current
    step. A second signal ends the training at once. Recipe and tokenizer are in the checkpoint as plain strings: it is
    a run by itself, and loads with ``weights_only=True``.

    A checkpoint is written when everything that belongs to its step is done: its figures are logged, a validation that
    is due has run, and at the end of an epoch all other callbacks have seen that end. (Lightning calls a `Checkpoint`
    last.) A training that is resumed from it does all of this neither twice nor never.

    Args:
        path: of the newest checkpoint.
        recipe: of the run, as YAML.
        tokenizer: of the run, as JSON.
        saving: how often.
        start_run: called on the first rank before the first step, when nothing can be refused any more.
    """

    def __init__(
        self,
        path: Path,
        recipe: str,
        tokenizer: str,
        saving: Saving = Saving(),
        start_run: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._saving, self._start_run = path, saving, start_run
        self.has_started = False
        self._texts = {"recipe": recipe, "tokenizer": tokenizer}
        self._signalled = self._stopping = self._updating = self._validating = self._due = False
        self._handlers: dict[int, Any] = {}  # signal handlers from before the training
        self._step = self._saved = 0  # the last finished step, and the last one in a checkpoint
        self._rows: int | None = 0  # of metrics.csv after that step

    def on_save_checkpoint(self, trainer: Any, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds recipe and tokenizer, and brings Lightning's counters into the form from which it resumes exactly.

        What Lightning does after a restart depends on which of an event's four counters (ready, started, processed,
        completed) agree, and it expects those of its own `ModelCheckpoint`, which saves earlier than we do.
        """
        checkpoint["ltm_pyro"] = self._texts
        checkpoint["metrics_rows"] = self._rows
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        validation, steps = loops["epoch_loop.val_loop.batch_progress"], loops["epoch_loop.state_dict"]
        whole = batches["current"]["processed"] >= trainer.fit_loop.max_batches
        if self._validating:  # begin this validation anew, then go on
            for name in ("total", "current"):
                _count(batches[name], batches[name]["processed"])
                _count(epochs[name], epochs[name]["started"], finished=epochs[name]["started"] - 1)
                _count(validation[name], 1, finished=0)
        elif whole or not batches["current"]["processed"]:  # begin the next epoch
            for name in ("total", "current"):
                _count(batches[name], batches[name]["processed"] if name == "total" else 0)
                _count(epochs[name], epochs[name]["started" if whole else "processed"])
            batches["is_last_batch"] = False
            checkpoint["epoch"] = epochs["current"]["completed"]
        else:  # go on within the epoch; a batch without `completed` has been validated, if that was due
            for name in ("total", "current"):
                _count(batches[name], batches[name]["processed"])
                batches[name]["completed"] -= 1
                _count(epochs[name], epochs[name]["started"], finished=epochs[name]["started"] - 1)
            batches["is_last_batch"] = False
            steps["_batches_that_stepped"] -= 1  # Lightning counts this batch once more

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begins, and installs signal handlers that let the current step finish."""
        loop = trainer.fit_loop.epoch_loop
        if not loop.batch_progress.current.ready:  # an epoch begins, also if this training is resumed
            loop.restarting = False
        if trainer.is_global_zero:
            self._start_run()
        self.has_started = True
        self._saved = trainer.global_step
        self._note_position(trainer, module)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        """Saves the step before, and stops after a signal: by now its figures are logged, and it is validated."""
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self._batches:
            self._rows = _rows(trainer)
        if self._due:
            self._save(trainer)
        if self._stopping:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Notes that a validation runs."""
        self._validating = True

    def on_validation_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        """Stops a validation after a signal; a training that is resumed begins it anew."""
        if self._is_averaged(trainer):
            return
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)
        if self._stopping:
            self._save_end(trainer, module)
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Notes that the validation is over; the other callbacks have seen its figures."""
        self._validating = False

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Saves the last step of an epoch, and that of the training, after the other callbacks have seen its end.

        The end of the training is seen by nobody yet: more steps can follow it, as if it had not been.
        """
        loop, steps, epochs = trainer.fit_loop, trainer.max_steps, trainer.max_epochs
        is_cut = loop.epoch_loop.batch_progress.current.processed < loop.max_batches
        is_spent = 0 <= steps <= trainer.global_step or 0 <= epochs <= loop.epoch_progress.current.processed
        if is_cut or is_spent or trainer.should_stop:
            self._save_end(trainer, module)
        elif self._due:
            self._rows = _rows(trainer)
            self._save(trainer)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Notes that the weights may be half updated from here to the end of the batch."""
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Decides whether to save this step: every ``saving.every`` steps, and if any rank has received a signal."""
        self._updating = False
        if trainer.global_step == self._step:  # gradients are still accumulated
            return
        self._note_position(trainer, module)
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)
        self._due = self._stopping or self._step % self._saving.every == 0

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Saves the last finished step, unless the weights may be half updated.

        A `UsageError` is raised before the weights change. Several ranks cannot save after an error on one of them, and
        a training that a signal ends has been saved already.
        """
        half = self._is_averaged(trainer) or (self._updating and not isinstance(exception, UsageError))
        if self._step and not half and trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt):
            self._save_end(trainer, module)

    def _is_averaged(self, trainer: Any) -> bool:
        """Whether the weights are averages that a callback validates, and those of the training elsewhere."""
        return self._validating and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)

    def _note_position(self, trainer: Any, module: Any) -> None:
        """Notes the last finished step, and the FLOPs and batches up to it."""
        self._step, self._flops = trainer.global_step, module.flops.clone()
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _save_end(self, trainer: Any, module: Any) -> None:
        """Saves the last finished step of a training that ends, as if none of the batches after it had begun."""
        module.flops.copy_(self._flops)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        begun = progress.total.processed - self._batches
        self._validating = self._validating and not begun  # otherwise the batches come again, and their validation
        self._rows = self._rows if begun else _rows(trainer)
        for count in (progress.total, progress.current):
            count.ready = count.started = count.processed = count.processed - begun
            count.completed = min(count.completed, count.processed)
        self._save(trainer)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Restores the signal handlers from before the training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: pl.Trainer) -> None:
        self._due = False
        if not all(p.isfinite().all() for p in trainer.lightning_module.parameters()):
            return  # because the last checkpoint is still good
        first = trainer.is_global_zero
        with atomic_write(self._path) if first else nullcontext(self._path) as new:
            trainer.save_checkpoint(new, weights_only=False)  # all ranks take part, and the first one writes
            if first:
                self._keep_older()
        self._saved = trainer.global_step

    def _keep_older(self) -> None:
        """Keeps the previous checkpoint under the name of its step, and deletes the oldest."""
        if self._saved == self._step:
            return
        older = self._path.with_name(f"step-{self._saved:09d}.ckpt")
        if self._saving.keep > 1 and self._path.exists() and not older.exists():
            try:
                os.link(self._path, older)
            except OSError:  # a file system without hard links
                shutil.copyfile(self._path, older)
        for old in sorted(self._path.parent.glob("step-*.ckpt"))[: 1 - self._saving.keep or None]:
            old.unlink()


def _rows(trainer: Any) -> int | None:
    """The rows of metrics.csv so far; None if this training writes none."""
    return next((log.rows for log in trainer.loggers if isinstance(log, MetricsFile)), None)


def _count(progress: dict[str, int], started: int, finished: int | None = None) -> None:
    """Sets Lightning's four counters of an event; all that have started are finished if not told otherwise."""
    progress["ready"] = progress["started"] = started
    progress["processed"] = progress["completed"] = started if finished is None else finished
