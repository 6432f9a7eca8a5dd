"""``metrics.csv``: what a training leaves for scripts and pictures."""

import csv
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from ltm_pyro.utils.files import atomic_write

COLUMNS = (
    *("step", "seconds", "train/loss", "train/kl", "train/fast_rate", "train/slow_rate", "train/tokens_per_second"),
    *("val/bound", "val/kl", "train/flops", "train/fast_steps", "train/flops_per_second"),
)


class MetricsFile(Logger):
    """``metrics.csv`` of a run: one row per logged step.

    A run that is ``resumed`` at a step goes on there: later rows are dropped, for they come again; its seconds go on.
    """

    name = version = ""

    def __init__(self, path: Path, resumed: int | None = None) -> None:
        super().__init__()
        self._path, self._began, self._resumed = path, time.monotonic(), resumed

    @rank_zero_only
    def take_up(self) -> None:
        """Takes up the file of the run that is resumed."""
        if self._resumed is None or not self._path.exists():
            return
        with self._path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < self._resumed]
        self._began -= max((float(row["seconds"]) for row in rows), default=0.0)
        with atomic_write(self._path) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row; columns that a row has no figure for stay empty."""
        seconds, new = round(time.monotonic() - self._began, 3), not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow({**metrics, "step": step, "seconds": seconds})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's ``config.yaml`` already says them."""
