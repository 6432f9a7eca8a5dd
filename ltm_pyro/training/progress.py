"""What a person sees while a model trains."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ltm_pyro.contracts import Batch

SHOWN = {"train/loss": "loss", "val/bound": "held-out bound", "val/kl": "KL"}  # the progress line's figures, nats/token


class Progress(Callback):
    """One line on standard error: how far, how fast, how good, how long still; ten in all where that is no terminal."""

    def __init__(self) -> None:
        columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
        texts = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        console = Console(stderr=True)
        self._bar = RichProgress(*columns, *texts, console=console, disable=not console.is_terminal)
        self._clock, self._tenths = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Shows the bar."""
        self._task = self._bar.add_task("training", total=1.0, figures="")
        self._bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Starts the clock of one step."""
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        """Logs tokens per second and refreshes the line."""
        speed = batch.inputs_BT.numel() / (time.perf_counter() - self._clock)
        module.log("train/tokens_per_second", speed)
        if index % trainer.log_every_n_steps:
            return
        figures = trainer.callback_metrics
        text = "  ".join(f"{name} {figures[k]:.3f}" for k, name in SHOWN.items() if k in figures)
        self._show(module.progress, f"{speed:,.0f} tokens/s  {text}")

    def _show(self, progress: float, figures: str) -> None:
        self._bar.update(self._task, completed=progress, figures=figures)
        if self._bar.disable and int(10 * progress) > self._tenths:
            self._tenths = int(10 * progress)
            print(f"training {progress:4.0%}  {figures}", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leaves the terminal as it was, also after Ctrl-C."""
        self._bar.stop()
