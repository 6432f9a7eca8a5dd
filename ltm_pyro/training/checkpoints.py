"""Atomic checkpoints and graceful shutdown: a training can be resumed after its end, a signal or an error."""

import os
import shutil
import signal
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ltm_pyro.contracts import Batch
from ltm_pyro.errors import UsageError
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


class Checkpoints(Callback):
    """Keeps the newest checkpoints, each written atomically: under another name, then renamed.

    One is written every ``saving.every`` steps, at the end, after an error, and on Ctrl-C or SIGTERM after the current
    step. A second signal ends the training at once. Recipe and tokenizer are in the checkpoint as plain strings: it is
    a run by itself, and loads with ``weights_only=True``.
    """

    def __init__(self, path: Path, recipe: str, tokenizer: str, saving: Saving = Saving()) -> None:
        self._path, self._saving = path, saving
        self._texts = {"recipe": recipe, "tokenizer": tokenizer}
        self._signalled = self._stopping = self._updating = False
        self._handlers: dict[int, Any] = {}  # signal handlers from before the training
        self._step = self._saved = 0  # the last finished step, and the last one in a checkpoint

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds recipe and tokenizer."""
        checkpoint["ltm_pyro"] = self._texts

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Installs signal handlers that let the current step finish."""
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
        """Stops after a signal: here and not at the end of a batch, because by now its figures are logged."""
        if self._stopping:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Notes that the weights may be half updated from here to the end of the batch."""
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Saves every ``saving.every`` steps, and if any rank has received a signal."""
        self._updating = False
        if trainer.global_step == self._step:  # gradients are still accumulated
            return
        self._note_position(trainer, module)
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)
        if self._stopping or self._step % self._saving.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves the result so that it can be resumed for more steps.

        Lightning would otherwise skip the rest of an unfinished epoch, and the whole epoch after a finished one.
        """
        self._rewind(trainer, module)
        loop: Any = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
        if batches.current.processed < loop.max_batches:
            for count in (epochs.total, epochs.current):
                count.processed = count.completed = count.started - 1
        else:
            batches.reset_on_run()
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Saves the last finished step, unless the weights may be half updated.

        A `UsageError` is raised before the weights change. Several ranks cannot save after an error on one of them, and
        a training that a signal ends has been saved already.
        """
        half = self._updating and not isinstance(exception, UsageError)
        if self._step and not half and trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt):
            self._rewind(trainer, module)
            self._save(trainer)

    def _note_position(self, trainer: Any, module: Any) -> None:
        """Notes the last finished step, and the FLOPs and batches up to it."""
        self._step, self._flops = trainer.global_step, module.flops.clone()
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _rewind(self, trainer: Any, module: Any) -> None:
        """Resets the counters to the last finished step, as if none of the batches after it had begun."""
        module.flops.copy_(self._flops)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        begun = progress.total.processed - self._batches
        for count in (progress.total, progress.current):
            count.ready = count.started = count.processed = count.processed - begun
            count.completed = min(count.completed, count.processed)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Restores the signal handlers from before the training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: pl.Trainer) -> None:
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
