"""``metrics.csv``: what a training leaves for scripts and pictures."""

import csv
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

COLUMNS = (
    *("step", "seconds", "train/loss", "train/kl", "train/fast_rate", "train/slow_rate", "train/tokens_per_second"),
    *("val/bound", "val/kl", "train/flops", "train/fast_steps"),
)


class MetricsFile(Logger):
    """``metrics.csv`` of a run: one row per logged step, appended to when a run is resumed; its seconds go on too."""

    name = version = ""

    def __init__(self, path: Path, resumed: bool = False) -> None:
        super().__init__()
        self._path, self._began = path, time.monotonic()
        if resumed and path.exists():
            with path.open(newline="") as file:
                self._began -= max((float(row["seconds"]) for row in csv.DictReader(file)), default=0.0)

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
