"""Trials in shared storage: as many as asked for in all, each claimed once, retried when its worker has died.

A study begins as N waiting trials without parameters. A worker claims one (the database lets only one succeed), and
only then the sampler chooses its parameters. So N is the total whatever the number of workers and restarts. The
baseline and the repeats of the best setting are waiting trials too, in a companion study, where no sampler sees them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.objective import RUNGS
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.studies.search.storage import without_password

PLAN, SOURCE, REASON = "plan", "source", "reason"  # names of attributes
FIGURES, SETTINGS, SEED, RUN = "figures", "settings", "seed", "run"
CHECKS = ":checks"  # ends the name of a study's companion
STARTUP = 5  # trials drawn at random before the sampler uses the earlier ones


def open_study(storage: RDBStorage, name: str, plan: Plan) -> optuna.Study:
    """Creates a study, or resumes the one that has this plan; `UsageError` if the plan is another."""
    pruner = HyperbandPruner(1, round(1 / RUNGS[0]), 3) if plan.pruned else NopPruner()
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        pruner=pruner,
        directions=["minimize"] * len(plan.minimise),
        load_if_exists=True,
    )
    if PLAN not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(PLAN, plan.as_dict())
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


def load_study(storage: RDBStorage, name: str) -> optuna.Study:
    """An existing study."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = ", ".join(study_names(storage)) or "none"
        raise UsageError(f"There is no study '{name}' in {without_password(storage.url)}: it holds {there}.") from None


def study_names(storage: RDBStorage) -> list[str]:
    """The studies in a storage that `ltm study run` made, without their companions for the checks."""
    studies = optuna.get_all_study_summaries(storage, include_best_trial=False)
    return [s.study_name for s in studies if PLAN in s.user_attrs and not s.study_name.endswith(CHECKS)]


def current_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, in order: one that was retried counts in its first place."""
    trials = study.get_trials(deepcopy=False)
    superseded = {number for t in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(t)}
    return sorted((t for t in trials if t.number not in superseded), key=_place)


def _place(trial: FrozenTrial) -> int:
    original = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if original is None else original


def enqueue(study: optuna.Study, points: Sequence[Values]) -> None:
    """Adds waiting trials until there are as many as ``points``; an empty point is chosen by the sampler.

    Two machines that do so at once may add too many. The surplus stays behind the last that counts, and waits.
    """
    for point in points[len(current_trials(study)) :]:
        study.enqueue_trial(point)


def ensure_checks(checks: optuna.Study, chosen: FrozenTrial, roles: Sequence[Values]) -> list[FrozenTrial]:
    """The checks of a trial of the search, one for every role; missing ones are created."""
    found = existing_checks(checks, chosen)
    missing = [role for role in roles if (role["role"], role.get("repeat")) not in found]
    for role in missing:
        checks.enqueue_trial({}, user_attrs=role | {"of": chosen.number})
    return list((existing_checks(checks, chosen) if missing else found).values())


def existing_checks(checks: optuna.Study, chosen: FrozenTrial) -> dict[tuple[str, int | None], FrozenTrial]:
    """The existing checks of a trial, by role and repeat; of two that two machines created at once the first counts."""
    found: dict[tuple[str, int | None], FrozenTrial] = {}
    for trial in current_trials(checks):
        if trial.user_attrs["of"] == chosen.number:
            found.setdefault((trial.user_attrs["role"], trial.user_attrs.get("repeat")), trial)
    return found


def first_points(definition: Definition, trials: int) -> list[Values]:
    """The parameters of the first trials: the study's grid, or its first point and then empty ones for the sampler."""
    chosen = list(definition.points) or [definition.first or {}]
    return (chosen + [{}] * trials)[:trials]


def claim(study: optuna.Study, counted: Callable[[], list[FrozenTrial]], seed: int) -> optuna.Trial | None:
    """Takes the first waiting trial among those ``counted``, for this worker alone; None when none waits.

    The sampler is seeded with the study's seed and the trial's place: what it proposes depends on the trials before,
    not on how often the study was interrupted.
    """
    fail_stale_trials(study)
    for waiting in (t for t in counted() if t.state == TrialState.WAITING):
        record_heartbeat(study, waiting)  # before the claim, so that no claimed trial is ever without one
        try:
            if study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                mixed = np.random.SeedSequence((seed, _place(waiting))).generate_state(1)[0]
                study.sampler = TPESampler(seed=int(mixed), n_startup_trials=STARTUP)
                return optuna.Trial(study, waiting._trial_id)
        except UpdateFinishedTrialError:
            continue
    return None


def record_heartbeat(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
    """Records a heartbeat, so that no worker claims a trial that is still running."""
    cast(RDBStorage, study._storage).record_heartbeat(trial._trial_id)


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """A value for one parameter, from the sampler."""
    match distribution:
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)
        case IntDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_int(name, low, high, log=log, step=step)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise UsageError(f"The parameter {name} has a distribution that Optuna does not search: {distribution}.")


def times_tried_before(study: optuna.Study, number: int) -> int:
    """How many earlier trials have a trial's parameters: a setting that is tried again is trained with another seed."""
    one = study.get_trials(deepcopy=False)[number]
    return sum(t.params == one.params for t in current_trials(study) if _place(t) < _place(one))


def last_seed(study: optuna.Study, number: int) -> int:
    """The largest seed with which the search trains a trial's parameters; the repeats' seeds follow it."""
    params = study.get_trials(deepcopy=False)[number].params
    return max(t.user_attrs[SEED] for t in current_trials(study) if t.params == params and SEED in t.user_attrs)


def finish(study: optuna.Study, trial: optuna.Trial, figures: dict[str, float]) -> None:
    """Records a trial's figures and its constraints; without its objectives it has failed."""
    plan = plan_of(study)
    trial.set_user_attr(FIGURES, {k: v if math.isfinite(v) else None for k, v in figures.items()})
    objectives = [figures.get(name, math.nan) for name in plan.minimise]
    if missing := [name for name in plan.minimise if name not in figures]:
        return fail(study, trial, f"no figure `{missing[0]}`, but {', '.join(figures) or 'none'}")
    if not all(map(math.isfinite, objectives)):
        told = ", ".join(f"{name} is {value}" for name, value in zip(plan.minimise, objectives, strict=True))
        return fail(study, trial, f"no finite objective: {told}")
    for name, value in excess(figures, plan).items():
        trial.set_constraint(name, value)
    study.tell(trial, objectives)
    return None


def fail(study: optuna.Study, trial: optuna.Trial, reason: str, state: TrialState = TrialState.FAIL) -> None:
    """Records a trial as failed, or pruned, and why."""
    trial.set_user_attr(REASON, reason)
    study.tell(trial, state=state)


def requeue(study: optuna.Study, trial: optuna.Trial) -> None:
    """Ends a trial that was interrupted and enqueues its parameters again."""
    fail(study, trial, "interrupted; it waits again")
    frozen = next(t for t in study.get_trials() if t.number == trial.number)
    kept = {k: v for k, v in frozen.user_attrs.items() if k != REASON}
    frozen.user_attrs = kept
    RetryHeartbeatStaleTrialCallback()(study, frozen)


def excess(figures: dict[str, float], plan: Plan) -> dict[str, float]:
    """By how much each limited figure is above its limit; infinite if it was not recorded or is not a number."""
    found = {name: figures.get(name, math.nan) - most for name, most in plan.at_most.items()}
    return {name: math.inf if math.isnan(x) else x for name, x in found.items()}


def feasible(study: optuna.Study) -> list[FrozenTrial]:
    """The completed trials that keep every limit."""
    done = (t for t in current_trials(study) if t.state == TrialState.COMPLETE)
    return [t for t in done if all(x <= 0 for x in t.constraints.values())]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The feasible trial with the lowest first objective."""
    return min(feasible(study), key=lambda t: t.values[0], default=None)
