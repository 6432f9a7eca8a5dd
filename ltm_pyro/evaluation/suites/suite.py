"""What a suite is: parts that can each be computed for one run, so that finished ones survive a kill."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference
from ltm_pyro.runs.run import Run

Figures = dict[str, Any]  # name -> number, ready for JSON


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every suite may ask for.

    Args:
        directory: where the data are; each suite says which files it looks for.
        sources: places of single data sets, by name, in place of files in ``directory``.
        limit: only so many sequences, questions or texts of each part.
        samples: S, draws per sequence made after q is final.
        fast_steps: T_fast; what the recipe says under ``evaluation`` when not given.
        seed: of all noise.
        shots: worked examples before a question of GSM8K.
        attempts: answers per question of GSM8K.
        features: a run, or a folder with a Hugging Face model, whose hidden states are MAUVE's features.
        judge: a run under which written text is scored.
    """

    directory: Path | None = None
    sources: Mapping[str, str] | None = None
    limit: int | None = None
    samples: int = 16
    fast_steps: int | None = None
    seed: int = 0
    shots: int = 3
    attempts: int = 5
    features: str | None = None
    judge: str | None = None

    def found(self, name: str, *patterns: str) -> str | None:
        """The place given for a data set, or what in ``directory`` fits the first pattern that anything fits."""
        if self.sources and (name in self.sources or self.directory is None):
            return self.sources.get(name)
        matches = (path for pattern in patterns for path in sorted(self.folder.rglob(pattern)))
        return next((str(path) for path in matches), None)

    def inference(self, run: Run) -> LocalInference:
        """The run's, of evaluation, with ``fast_steps`` where they are given."""
        return run.inference if self.fast_steps is None else replace(run.inference, steps=self.fast_steps)

    @property
    def folder(self) -> Path:
        """``directory``, which must be there."""
        if self.directory is None:
            raise UsageError("The suites need data: give --suite-dir, or --source NAME=PLACE for each data set.")
        if not self.directory.is_dir():
            raise UsageError(f"The suite directory {self.directory} does not exist: give a folder with the data.")
        return self.directory


class Part(NamedTuple):
    """One line of a suite's table.

    ``theirs`` are the figures of arXiv 2502.01567 for its own models, of other sizes and on other data.
    """

    name: str
    figures: Callable[[Run], Figures]
    theirs: Mapping[str, float] = {}


class Suite(NamedTuple):
    """How its parts are found, and which of their figures the table shows first."""

    parts: Callable[[Options], list[Part]]
    about: str
    shown: tuple[str, ...]


def none_found(suite: str, expected: str, options: Options) -> UsageError:
    """No data: which files the suite looks for."""
    place = options.directory or f"--source {', '.join(options.sources or ())}"
    return UsageError(f"{place} has no data for the suite {suite}: it looks for {expected}.")
