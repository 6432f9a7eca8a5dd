"""Checkpoints that are always whole."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class LastCheckpoint(Callback):
    """Keeps one checkpoint that is always whole: written beside the old one, then renamed over it.

    It is written every ``every`` steps, at the end, and on Ctrl-C, SIGTERM or an error. Recipe and tokenizer travel in
    it as plain strings, so that a checkpoint alone is a run and loads without unpickling anything.
    """

    def __init__(self, path: Path, recipe: str, tokenizer: str, every: int = 500) -> None:
        self._path, self._every = path, every
        self._texts = {"recipe": recipe, "tokenizer": tokenizer}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the texts."""
        checkpoint["ltm_pyro"] = self._texts

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves at every ``every``-th step."""
        if trainer.global_step and trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves the result."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Saves what there is, once training has begun."""
        if trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if not all(p.isfinite().all() for p in trainer.lightning_module.parameters()):
            return  # never over a good checkpoint
        new = self._path.with_suffix(".new")
        try:
            trainer.save_checkpoint(new, weights_only=False)
            if trainer.is_global_zero:
                new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
