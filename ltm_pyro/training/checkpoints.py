"""Checkpoints that are always whole, and an end that can be resumed from whatever ends a training."""

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
        keep: how many of the newest stay: ``last.ckpt``, and ``step-….ckpt`` before it.
    """

    every: int = 500
    keep: int = 1

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UsageError(f"`checkpoints` needs every ≥ 1 and keep ≥ 1, got {self.every} and {self.keep}.")


class Checkpoints(Callback):
    """Keeps the newest checkpoints, each always whole: written under another name, then renamed.

    One is written every so many steps, at the end, on Ctrl-C and SIGTERM once the step is finished, and on an error.
    Recipe and tokenizer travel in it as plain strings, so that a checkpoint alone is a run and loads without unpickling
    anything. A second signal ends the training at once.
    """

    def __init__(self, path: Path, recipe: str, tokenizer: str, saving: Saving = Saving()) -> None:
        self._path, self._saving = path, saving
        self._texts = {"recipe": recipe, "tokenizer": tokenizer}
        self._signalled = self._stopping = self._updating = False
        self._handlers: dict[int, Any] = {}
        self._step = self._saved = 0

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the texts."""
        checkpoint["ltm_pyro"] = self._texts

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Listens to signals; a step that has begun is finished before they end it."""
        self._saved = trainer.global_step
        self._whole(trainer, module)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        """Ends a training that was told to end: here, where the last step's figures are logged already."""
        if self._stopping:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, *args: Any) -> None:
        """From here to the end of the batch the weights may be half updated."""
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """Saves at every so many steps, and when a signal has come to any rank."""
        self._updating = False
        if trainer.global_step == self._step:  # gradients are still accumulated
            return
        self._whole(trainer, module)
        self._stopping = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)
        if self._stopping or self._step % self._saving.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves the result as if it were no end, so that more steps may follow.

        Lightning would skip the rest of an epoch that the end cuts, and the whole epoch behind one that is over.
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
        """Saves what there is, unless it was saved before or may be half a step; several ranks cannot do it together.

        An error of our own comes before the weights are touched.
        """
        half = self._updating and not isinstance(exception, UsageError)
        if self._step and not half and trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt):
            self._rewind(trainer, module)
            self._save(trainer)

    def _whole(self, trainer: Any, module: Any) -> None:
        """Notes where the last whole step ended."""
        self._step, self._flops = trainer.global_step, module.flops.clone()
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _rewind(self, trainer: Any, module: Any) -> None:
        """Goes back there: of a step that failed, or that time ended amid its batches, nothing has begun."""
        module.flops.copy_(self._flops)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        begun = progress.total.processed - self._batches
        for count in (progress.total, progress.current):
            count.ready = count.started = count.processed = count.processed - begun
            count.completed = min(count.completed, count.processed)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: pl.Trainer) -> None:
        if not all(p.isfinite().all() for p in trainer.lightning_module.parameters()):
            return  # never over a good checkpoint
        first = trainer.is_global_zero
        with atomic_write(self._path) if first else nullcontext(self._path) as new:
            trainer.save_checkpoint(new, weights_only=False)  # all ranks take part, and the first one writes
            if first:
                self._keep_older()
        self._saved = trainer.global_step

    def _keep_older(self) -> None:
        """Gives the last checkpoint a second name, and takes the oldest away."""
        if self._saved == self._step:
            return
        older = self._path.with_name(f"step-{self._saved:09d}.ckpt")
        if self._saving.keep > 1 and self._path.exists() and not older.exists():
            try:
                os.link(self._path, older)
            except OSError:  # no links on this file system
                shutil.copyfile(self._path, older)
        for old in sorted(self._path.parent.glob("step-*.ckpt"))[: 1 - self._saving.keep or None]:
            old.unlink()
