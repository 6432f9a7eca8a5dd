"""``metrics.csv``, a training's figures for scripts and plots."""

import csv
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from ltm_pyro.utils.files import atomic_write

COLUMNS = (
    *("step", "seconds", "train/loss", "train/kl", "train/fast_rate", "train/slow_rate", "train/tokens_per_second"),
    *("val/bound", "val/kl", "train/flops", "train/fast_steps", "train/flops_per_second", "train/padding"),
)


class MetricsFile(Logger):
    """``metrics.csv`` of a run: one row per logged step.

    If a run is ``resumed`` from a checkpoint, the rows after it are dropped, because they are logged again; the seconds
    continue.

    Args:
        path: of the file.
        resumed: the step of the checkpoint.
        rows: the number of rows when it was written. (A validation between two slow steps has the same step as one
            before it.)
    """

    name = version = ""

    def __init__(self, path: Path, resumed: int | None = None, rows: int | None = None) -> None:
        super().__init__()
        self._path, self._began, self._resumed, self._kept = path, time.monotonic(), resumed, rows
        self.rows = 0  # written so far

    @rank_zero_only
    def resume(self) -> None:
        """Continues the file of the run that is resumed."""
        if self._resumed is None or not self._path.exists():
            return
        text = self._path.read_text("utf-8", "replace")
        lines = text[: text.rfind("\n") + 1].splitlines()  # a power failure may have cut the last one
        rows = [row for row in csv.DictReader(lines) if _is_whole(row) and int(row["step"]) < self._resumed]
        rows = rows[: self._kept]
        self.rows = len(rows)
        self._began -= max((float(row["seconds"]) for row in rows), default=0.0)
        with atomic_write(self._path) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row; columns without a figure stay empty, and without any figure there is no row."""
        if not metrics.keys() & COLUMNS[2:]:  # such as those that a callback logs for another logger
            return
        seconds, new = round(time.monotonic() - self._began, 3), not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            at = max(step or 0, 0)  # -1 is what Lightning calls a validation before the first slow step
            writer.writerow({**metrics, "step": at, "seconds": seconds})
        self.rows += 1

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` has them."""


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row has all its cells: a power failure may leave zero bytes."""
    try:
        return None not in row.values() and None not in row and int(row["step"]) >= 0 and float(row["seconds"]) >= 0
    except (KeyError, TypeError, ValueError):
        return False
