"""The progress of a running study on the terminal: every trial's, and the best objective so far."""

import sys
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.trials import REASON, current_trials, feasible, is_ours, plan_of
from ltm_pyro.utils.console import Console


class Watch:
    """One bar for the study and one per running trial on a terminal; elsewhere one line per finished trial."""

    def __init__(self, name: str, total: int, done: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._study = self._bar.add_task(name, total=total, completed=done)
        self._total = total
        self._slots: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def trial_started(self, slot: int, name: str, parameters: dict[str, Any]) -> None:
        """Adds a bar for a trial."""
        text = ", ".join(
            f"{k.rsplit('.', 1)[-1]} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items()
        )
        self._slots[slot] = self._bar.add_task(f"  {name} {text}"[:70], total=1.0)

    def trial_progressed(self, slot: int, progress: float) -> None:
        """Updates the bar of a trial: ``progress`` from 0 to 1."""
        self._bar.update(self._slots[slot], completed=progress)

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(line, highlight=False)

    def trial_ended(self, slot: int, study: optuna.Study, number: int) -> None:
        """Removes the bar of a trial, and prints its outcome."""
        self._bar.remove_task(self._slots.pop(slot))
        trial, plan = study.get_trials()[number], plan_of(study)
        role = trial.user_attrs.get("role")
        line = f"{role or 'trial'} {number}: {_outcome(trial, plan)}"
        if not role:
            finished = [t for t in current_trials(study) if t.state.is_finished() and is_ours(t)]
            self._bar.update(self._study, completed=len(finished))
            (name, sign), done = plan.objectives[0], [t.values[0] for t in feasible(study)]
            known = f", best {name} {min(done) if sign > 0 else max(done):.4f}" if done else ""
            line += f"  ({len(finished)} of {self._total}{known})"
        self.say(line)


def _outcome(trial: FrozenTrial, plan: Plan) -> str:
    if trial.state == TrialState.COMPLETE:
        return ", ".join(f"{name} {value:.4g}" for (name, _), value in zip(plan.objectives, trial.values, strict=True))
    return str(trial.user_attrs.get(REASON, trial.state.name))
