"""The progress line of a training."""

import resource
import sys
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ltm_pyro.contracts import Batch
from ltm_pyro.utils.console import Console

SHOWN = {"train/loss": "loss", "val/bound": "held-out bound", "val/kl": "KL"}  # the progress line's figures, nats/token

FORECAST = 10  # the step after which the remaining time is printed
REFRESH = 10  # steps between two updates if the training logs nothing


def _memory() -> float:
    """Peak memory in GiB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Progress(Callback):
    """One line on standard error: progress, speed, loss and remaining time; ten lines in all if it is no terminal."""

    def __init__(self) -> None:
        columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn())
        texts = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        console = Console(stderr=True)
        self._bar = RichProgress(*columns, *texts, console=console, disable=not console.is_terminal)
        self._clock, self._tenths = 0.0, 0
        self._steps, self._began, self._before = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Shows the bar."""
        self._task = self._bar.add_task("training", total=1.0, figures="")
        if trainer.is_global_zero:
            self._bar.start()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        """Starts the clock of one step."""
        self._clock, self._flops = time.perf_counter(), module.flops.clone()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, index: int) -> None:
        """Logs tokens and FLOPs per second of all ranks, and updates the line."""
        seconds = time.perf_counter() - self._clock
        speed = trainer.world_size * batch.inputs_BT.numel() / seconds
        achieved = (module.flops - self._flops) / seconds
        module.log_dict({"train/tokens_per_second": speed, "train/flops_per_second": achieved})
        if not trainer.is_global_zero:
            return
        self._forecast(module)
        if index % (trainer.log_every_n_steps or REFRESH):
            return
        figures = trainer.callback_metrics
        text = "  ".join(f"{name} {figures[k]:.3f}" for k, name in SHOWN.items() if k in figures)
        self._show(module.progress, f"{speed:,.0f} tokens/s  {text}")

    def _forecast(self, module: Any) -> None:
        """Prints the remaining time after some steps; the first is not counted, because it warms up."""
        self._steps += 1
        if self._steps == 1:
            self._began, self._before = time.perf_counter(), module.progress
        if self._steps == FORECAST and (gained := module.progress - self._before) > 0:
            left = (1 - module.progress) * (time.perf_counter() - self._began) / gained
            self._bar.console.print(f"at this pace {timedelta(seconds=round(left))} to go, {_memory():.2f} GiB in use")

    def _show(self, progress: float, figures: str) -> None:
        self._bar.update(self._task, completed=progress, figures=figures)
        if self._bar.disable and int(10 * progress) > self._tenths:
            self._tenths = int(10 * progress)
            print(f"training {progress:4.0%}  {figures}", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Restores the terminal, also after Ctrl-C."""
        self._bar.stop()
