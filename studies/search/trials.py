"""Trials in shared storage: as many as asked for in all, each claimed once, retried when its worker has died.

A study begins as N waiting trials without parameters. A worker claims one (the database lets only one succeed), and
only then the sampler chooses its parameters. So N is the total whatever the number of workers and restarts. The
baseline and the repeats of the best setting are waiting trials too, in a companion study, where no sampler sees them.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.budget import MAX_FLOPS
from ltm_pyro.studies.configure import Values
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.samplers import make_pruner, make_sampler

PLAN, SOURCE, RULE, REASON = "plan", "source", "repeats", "reason"  # names of attributes
FIGURES, SETTINGS, SEED, RUN = "figures", "settings", "seed", "run"
FRESH = "fresh seeds after"  # an attribute of a study
LOST, AGAIN = "lost", "again"  # how often its worker died, and whether it is to wait again
ALIVE = "ltm_pyro:alive"  # a trial's heartbeat
RESERVED = {PLAN, SOURCE, REASON, FIGURES, SETTINGS, SEED, RUN, LOST, AGAIN, "role", "of", "repeat"}
CHECKS = ":checks"  # ends the name of a study's companion
HEARTBEAT, GRACE = 10, 40  # seconds between two heartbeats, and without one until a worker counts as dead
RETRIES = 3  # of a trial whose worker died
Check = tuple[str, int, int | None]  # role, trial, repeat


def open_study(storage: BaseStorage, name: str, plan: Plan) -> optuna.Study:
    """Creates a study, or resumes the one that has this plan; `UsageError` if the plan is another."""
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        pruner=make_pruner(plan.pruner),
        directions=["minimize" if sign > 0 else "maximize" for _, sign in plan.objectives],
        load_if_exists=True,
    )
    if PLAN not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(PLAN, plan.as_dict())
        study.set_metric_names([name for name, _ in plan.objectives])
    elif differing := plan.difference(plan_of(study)):
        raise UsageError(f"The study '{name}' has another {differing}: choose another --study-name.")
    return study


def plan_of(study: optuna.Study) -> Plan:
    """The plan that every trial of a study shares; `UsageError` if it has none, or one of another version."""
    name = study.study_name
    if PLAN not in study.user_attrs:
        raise UsageError(f"The study '{name}' was not made by `ltm study run`: choose another --study-name.")
    try:
        return Plan.from_dict(study.user_attrs[PLAN])
    except (TypeError, KeyError):
        raise UsageError(
            f"The study '{name}' was made by another version of ltm_pyro: choose another --study-name or --storage."
        ) from None


def load_study(storage: BaseStorage, name: str) -> optuna.Study:
    """An existing study."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = ", ".join(study_names(storage)) or "none"
        raise UsageError(f"There is no study '{name}' in the storage: it holds {there}.") from None


def study_names(storage: BaseStorage) -> list[str]:
    """The studies in a storage that `ltm study run` made, without their companions for the checks."""
    studies = optuna.get_all_study_summaries(storage, include_best_trial=False)
    return [s.study_name for s in studies if PLAN in s.user_attrs and not s.study_name.endswith(CHECKS)]


def current_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, in order: one that was retried counts in its first place.

    Of two retries of one trial, made by two workers at once, the first counts.
    """
    trials = study.get_trials(deepcopy=False)
    superseded = {number for t in trials for number in _history(t)}
    first: dict[int, int] = {}
    for t in trials:
        if history := _history(t):
            first.setdefault(history[-1], t.number)
    counted = (t for t in trials if t.number not in superseded)
    return sorted((t for t in counted if not _history(t) or first[_history(t)[-1]] == t.number), key=_place)


def _history(trial: FrozenTrial) -> list[int]:
    return RetryHeartbeatStaleTrialCallback.retry_history(trial)


def _place(trial: FrozenTrial) -> int:
    original = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if original is None else original


def is_ours(trial: FrozenTrial) -> bool:
    """Whether a trial waits for us or was run by us; others may add trials of theirs through Optuna."""
    known = trial.user_attrs.keys() & {SETTINGS, REASON} or ALIVE in trial.system_attrs
    return trial.state == TrialState.WAITING or bool(known)


def counted_trials(study: optuna.Study, total: int) -> list[FrozenTrial]:
    """The trials of ours that make up a total: those that run or ran, then waiting ones, those with a point first."""
    ours = [t for t in current_trials(study) if is_ours(t)]
    waiting = TrialState.WAITING
    return sorted(ours, key=lambda t: (t.state == waiting, t.state == waiting and not fixed_point(t)))[:total]


def fixed_point(trial: FrozenTrial) -> Values:
    """The parameters that a waiting trial was given; {} if the sampler chooses them."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def enqueue(study: optuna.Study, points: Sequence[Values]) -> None:
    """Adds waiting trials until there are as many as ``points``; an empty point is chosen by the sampler.

    Two machines that do so at once may add too many. The surplus stays behind the last that counts, and waits.
    """
    for point in points[len([t for t in current_trials(study) if is_ours(t)]) :]:
        study.enqueue_trial(point)


def ensure_checks(checks: optuna.Study, wanted: Sequence[Values]) -> list[FrozenTrial]:
    """The checks that are wanted (role, number of the trial they check, repeat); missing ones are created."""
    found = existing_checks(checks)
    missing = [about for about in wanted if _check(about) not in found]
    for about in missing:
        checks.enqueue_trial({}, user_attrs=about)
    found = existing_checks(checks) if missing else found
    return [found[_check(about)] for about in wanted]


def existing_checks(checks: optuna.Study) -> dict[Check, FrozenTrial]:
    """The existing checks by role, trial and repeat; of two that two machines created at once the first counts."""
    found: dict[Check, FrozenTrial] = {}
    for trial in current_trials(checks):
        if "of" in trial.user_attrs:
            found.setdefault(_check(trial.user_attrs), trial)
    return found


def _check(about: Mapping[str, Any]) -> Check:
    return about["role"], about["of"], about.get("repeat")


def first_points(definition: Definition, trials: int, known: Sequence[Values] = ()) -> list[Values]:
    """The parameters of the first trials: the study's grid; or its first point, some that are ``known`` from another
    study, and then empty ones for the sampler.
    """
    if definition.points and trials > len(definition.points):
        raise UsageError(
            f"The grid of {Path(definition.source).stem} has {len(definition.points)} points, and nothing is sampled "
            f"beside them: leave --trials out, or give at most as many."
        )
    chosen = list(definition.points) or [*([definition.first] if definition.first else []), *known]
    return (chosen + [{}] * trials)[:trials]


class Liveness:
    """Which running trials have lost their worker: those whose heartbeat has not changed for a while, as seen here.

    No clock but this machine's is read, and only while the storage answers: after an outage, in which no worker could
    write a heartbeat, watching begins anew.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float | None, float]] = {}  # trial: its heartbeat, and since when it is that one

    def forget(self) -> None:
        """Begins anew."""
        self._seen.clear()

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials whose worker counts as dead."""
        running = [t for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if is_ours(t)]
        now, found = time.monotonic(), []
        for trial in running:
            heartbeat, since = self._seen.get(trial._trial_id, (None, now))
            if heartbeat != trial.system_attrs.get(ALIVE, 0.0):
                heartbeat, since = trial.system_attrs.get(ALIVE, 0.0), now
            self._seen[trial._trial_id] = heartbeat, since
            if now - since > GRACE:
                found.append(trial)
        return found


def claim(
    study: optuna.Study, counted: Callable[[], list[FrozenTrial]], plan: Plan, liveness: Liveness | None = None
) -> optuna.Trial | None:
    """Takes the first waiting trial among those ``counted``, for this worker alone; None when none waits.

    The sampler is seeded with the study's seed and the trial's place: what it proposes depends on the trials before,
    not on how often the study was interrupted. Trials that have lost their worker wait again first.
    """
    for trial in liveness.lost(study) if liveness else ():
        requeue(study, trial, "its worker died", limit=RETRIES)
    _complete_retries(study)
    for waiting in (t for t in counted() if t.state == TrialState.WAITING):
        try:
            record_heartbeat(study, waiting)  # before the claim, so that no claimed trial is ever without one
            if study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                mixed = np.random.SeedSequence((plan.seed, _place(waiting))).generate_state(1)[0]
                study.sampler = make_sampler(plan.sampler, int(mixed), plan.seed)
                return optuna.Trial(study, waiting._trial_id)
        except UpdateFinishedTrialError:
            continue
    return None


def record_heartbeat(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
    """Records a heartbeat, so that no worker takes up a trial that is still running."""
    study._storage.set_trial_system_attr(trial._trial_id, ALIVE, time.time())


def next_seed(study: optuna.Study, number: int, seed: int) -> int:
    """The seed of a trial of the search: ``seed``, or a later one if the same setting has been tried before.

    Trials of one setting are counted in the order of their places, so that it does not depend on who is faster.
    """
    one = study.get_trials(deepcopy=False)[number]
    same = [t for t in current_trials(study) if is_ours(t) and t.params == one.params and t.number != number]
    taken = {t.user_attrs.get(SEED) for t in same}
    found = seed + sum(_place(t) < _place(one) for t in same)
    while found in taken:
        found += 1
    return found


def fresh_seed(study: optuna.Study, repeat: int, seed: int) -> int:
    """The seed of a repeat, the same for every setting: behind all of the search when the first repeat was begun."""
    if FRESH not in study.user_attrs:
        used = [t.user_attrs[SEED] for t in current_trials(study) if SEED in t.user_attrs]
        study.set_user_attr(FRESH, max(used, default=seed))
    return int(study.user_attrs[FRESH]) + repeat


def finish(study: optuna.Study, trial: optuna.Trial, figures: dict[str, float], plan: Plan) -> None:
    """Records a trial's figures and its constraints; without its objectives it has failed."""
    told = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    trial.set_user_attr(FIGURES, told)
    for name in told.keys() - RESERVED:  # each by itself as well, so that optuna-dashboard has them as axes
        trial.set_user_attr(name, told[name])
    names = [name for name, _ in plan.objectives]
    objectives = [figures.get(name, math.nan) for name in names]
    if missing := [name for name in names if name not in figures]:
        return fail(study, trial, f"no figure `{missing[0]}`, but {', '.join(figures) or 'none'}")
    if not all(map(math.isfinite, objectives)):
        said = ", ".join(f"{name} is {value}" for name, value in zip(names, objectives, strict=True))
        return fail(study, trial, f"no finite objective: {said}")
    for name, value in excess(figures, plan).items():
        trial.set_constraint(name, value)
    study.tell(trial, objectives)
    return None


def fail(study: optuna.Study, trial: optuna.Trial, reason: str, state: TrialState = TrialState.FAIL) -> None:
    """Records a trial as failed, or pruned, and why."""
    trial.set_user_attr(REASON, reason)
    study.tell(trial, state=state)


def requeue(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str, limit: int | None = None) -> None:
    """Ends a trial that was interrupted, and lets it wait again, in its place and with its parameters.

    Args:
        limit: how often in all; the next time it has failed. None for what no setting can be the reason of.
    """
    number, storage = trial.number, study._storage
    lost = study.get_trials(deepcopy=False)[number].user_attrs.get(LOST, 0) + (limit is not None)
    final = limit is not None and lost > limit
    with suppress(UpdateFinishedTrialError):  # another worker was faster
        said = f"{reason}, {lost} times" if final else f"{reason}; it waits again"
        for name, value in {REASON: said, LOST: lost, AGAIN: not final}.items():
            storage.set_trial_user_attr(trial._trial_id, name, value)
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        _complete_retries(study)


def _complete_retries(study: optuna.Study) -> None:
    """Lets every trial wait again that was ended for it; also what a worker had no time left to do."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for t in trials for number in _history(t)}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.user_attrs.get(AGAIN) and trial.number not in retried:
            again = copy.deepcopy(trial)
            again.user_attrs = {k: v for k, v in again.user_attrs.items() if k not in (REASON, AGAIN)}
            again.system_attrs.pop(ALIVE, None)
            RetryHeartbeatStaleTrialCallback()(study, again)


def excess(figures: dict[str, float], plan: Plan) -> dict[str, float]:
    """By how much each limited figure is above its limit; infinite if it was not recorded or is not a number."""
    found = {name: figures.get(name, math.nan) - most for name, most in plan.at_most.items()}
    return {name: math.inf if math.isnan(x) else x for name, x in found.items()}


def feasible(study: optuna.Study) -> list[FrozenTrial]:
    """The completed trials that keep every limit."""
    done = (t for t in current_trials(study) if t.state == TrialState.COMPLETE)
    return [t for t in done if all(x <= 0 for x in t.constraints.values())]


def row(trial: FrozenTrial, plan: Plan) -> dict[str, Any]:
    """A trial as plain data; one that others have added has its objectives as figures, and no seed."""
    attributes = trial.user_attrs
    figures = attributes.get(FIGURES)
    if figures is None and trial.state == TrialState.COMPLETE:
        figures = {name: value for (name, _), value in zip(plan.objectives, trial.values, strict=True)}
    lost = "its worker died" if trial.state == TrialState.FAIL else None
    return {
        "number": trial.number,
        "role": attributes.get("role", "trial" if is_ours(trial) else "added"),
        "of": attributes.get("of"),
        "repeat": attributes.get("repeat"),
        "state": trial.state.name.lower(),
        "within_limits": all(x <= 0 for x in trial.constraints.values()),
        "max_flops": attributes.get(SETTINGS, {}).get(MAX_FLOPS),
        "seed": attributes.get(SEED),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "parameters": dict(trial.params),
        "figures": figures or {},
        "reason": attributes.get(REASON, lost),
    }
