"""A study in a storage as an object, for notebooks and for `ltm study enqueue|rename|delete`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, json_to_distribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search import trials
from ltm_pyro.studies.search.definition import why_outside
from ltm_pyro.studies.search.storage import open_existing
from ltm_pyro.studies.search.study import check_name, describe, only_name, write_best


@dataclass(frozen=True)
class Study:
    """A study that `ltm study run` has made.

        study = Study("sqlite:///runs/studies.db", "rate_ratio")
        study.found["recommendation"], study.found["trials"]  # what `ltm study show --json` prints
        with study.opened() as found:
            optuna.visualization.matplotlib.plot_slice(found)

    Args:
        url: of the storage.
        name: of the study; not needed if it is the only one.
        runs: where the trials' runs are, for differences by document; ``runs/studies/NAME`` by default.

    Raises:
        UsageError: by every method, if there is no such storage or study.
    """

    url: str
    name: str | None = None
    runs: Path | None = None

    @property
    def found(self) -> dict[str, Any]:
        """The plan, every trial with its figures, and the recommendation; read anew at each access."""
        return describe(self.url, self.name, self.runs)

    @contextmanager
    def opened(self) -> Iterator[optuna.Study]:
        """Optuna's own object, for as long as the context lasts."""
        with self._open() as (_, found):
            yield found

    def best(self, file: Path, trial: int | None = None, force: bool = False, trust: bool = False) -> dict[str, Any]:
        """Writes the recommended trial, or a numbered one, as a recipe; returns its row."""
        return write_best(self.url, self.name, file, trial, force, trust)

    def enqueue(self, point: Mapping[str, Any]) -> int:
        """Adds a point that is tried before the sampler's own; returns its trial's number.

        Parameters that it leaves out are chosen by the sampler. `UsageError` for one that the space does not have.
        """
        with self._open() as (_, found):
            stored = trials.plan_of(found).space
            if "suggest" not in stored:  # a conditional space is known by the study's file only: checked when it is run
                space = {name: json_to_distribution(json.dumps(d)) for name, d in stored.items()}
                if wrong := why_outside(
                    {n: _as_stored(v, space.get(n)) for n, v in point.items()}, space, partial=True
                ):
                    raise UsageError(f"The point {dict(point)} is none of the space: {wrong}.")
                point = {n: _as_stored(v, space[n]) for n, v in point.items()}
            found.enqueue_trial(dict(point))
            return len(found.get_trials(deepcopy=False)) - 1

    def rename(self, new: str) -> None:
        """Gives the study another name; `UsageError` while trials run, or if there is one of that name."""
        check_name(new)
        if new.endswith(trials.CHECKS):
            raise UsageError(f"'{new}' would be the checks of another study: choose another name.")
        with self._open() as (storage, found):
            _check_at_rest(found, "renamed")
            name = found.study_name
            try:
                for end in ("", trials.CHECKS):
                    optuna.copy_study(
                        from_study_name=name + end, from_storage=storage, to_storage=storage, to_study_name=new + end
                    )
            except DuplicatedStudyError:
                raise UsageError(f"There is a study '{new}' already: choose another name.") from None
            self._remove(storage, name)

    def delete(self, force: bool = False) -> int:
        """Deletes the study and its trials from the storage, not their runs; how many trials it had.

        `UsageError` while trials run, unless ``force``.
        """
        with self._open() as (storage, found):
            if not force:
                _check_at_rest(found, "deleted")
            count = len(found.get_trials(deepcopy=False))
            self._remove(storage, found.study_name)
            return count

    @contextmanager
    def _open(self) -> Iterator[tuple[BaseStorage, optuna.Study]]:
        with open_existing(self.url) as storage:
            yield storage, trials.load_study(storage, only_name(storage, self.name))

    @staticmethod
    def _remove(storage: BaseStorage, name: str) -> None:
        for end in (trials.CHECKS, ""):
            optuna.delete_study(study_name=name + end, storage=storage)


def _check_at_rest(study: optuna.Study, what: str) -> None:
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if running:
        raise UsageError(f"{len(running)} trials of '{study.study_name}' run, and it is not {what}: stop them first.")


def _as_stored(value: Any, distribution: Any) -> Any:
    """A value from a command line as the space has it: a choice by its text, a whole number as a float."""
    if isinstance(distribution, CategoricalDistribution):
        return next((x for x in distribution.choices if x == value or str(x) == str(value)), value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and isinstance(getattr(distribution, "low", None), float) else value
