"""Trials in shared storage: as many as asked for in all, each claimed once, retried when its worker has died.

A study begins as N waiting trials without parameters. A worker claims one (the database lets only one succeed), and
only then the sampler chooses its parameters. So N is the total whatever the number of workers and restarts. The
baseline and the repeats of the best setting are waiting trials too, in a companion study, where no sampler sees them.
"""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values
from ltm_pyro.studies.search.definition import Definition
from ltm_pyro.studies.search.objective import RUNGS
from ltm_pyro.studies.search.plan import Plan
from ltm_pyro.utils.files import check_folder

PLAN, SOURCE, REASON = "plan", "source", "reason"  # attributes
FIGURES, SETTINGS, SEED = "figures", "settings", "seed"
CHECKS = ":checks"  # ends the name of a study's companion
HEARTBEAT, GRACE = 10, 40  # seconds between signs of life, and without one until a worker counts as dead
RETRIES = 3
MADE_TWICE = "already exists|no such table|UNIQUE constraint failed|duplicate key"  # what SQLite and PostgreSQL say
ATTEMPTS, PAUSE = 5, 0.5  # to open a storage that another worker is making; seconds in between
STARTUP = 5  # trials drawn at random before the sampler looks back


@contextmanager
def opened(url: str) -> Iterator[RDBStorage]:
    """The storage behind a URL, made when it is a new SQLite file in an existing folder; closed in the end.

    One that fails, then or later, is one sentence.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = _open(url)
            try:
                yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        except (NoSuchModuleError, ArgumentError, ImportError) as error:
            raise UsageError(
                f"The storage {shown(url)} cannot be used ({_first_line(error)}): give sqlite:///FILE, or "
                f"postgresql+psycopg://USER@HOST/DATABASE with ltm-pyro[studies] installed."
            ) from None
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
            raise UsageError(
                f"The storage {shown(url)} does not answer ({_first_line(cause)}): check the address and try again."
            ) from None


def shown(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _open(url: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sqlite = url.startswith("sqlite")
    options = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            storage = RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
            break
        except (SQLAlchemyError, StorageInternalError) as error:  # another makes the tables at this moment
            if attempt == ATTEMPTS - 1 or not re.search(MADE_TWICE, f"{error} {error.__cause__}"):
                raise
            time.sleep(PAUSE)
    if sqlite:
        _lock_before_reading(storage.engine)
    return storage


def _lock_before_reading(engine: Engine) -> None:
    """Every transaction holds SQLite's lock from its first read on: else two workers may claim one waiting trial.

    A database server locks the row that `claim` reads; SQLite has no such lock, and Python begins its transactions at
    the first write only.
    """
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # connections from before


def existing(url: str) -> AbstractContextManager[RDBStorage]:
    """The same, for reading: nothing is made."""
    file = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not file.is_file():
        raise UsageError(f"There is no storage at {file}: give the --storage that `ltm study run` had.")
    return opened(url)


def open_study(storage: RDBStorage, name: str, plan: Plan) -> optuna.Study:
    """Creates a study, or takes up the one that has this plan; `UsageError` where the plan is another."""
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
    """The plan that every trial of a study shares; `UsageError` where it has none that we understand."""
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
        raise UsageError(f"There is no study '{name}' in {shown(storage.url)}: it holds {there}.") from None


def study_names(storage: RDBStorage) -> list[str]:
    """The studies in a storage that `ltm study run` made, without their companions."""
    studies = optuna.get_all_study_summaries(storage, include_best_trial=False)
    return [s.study_name for s in studies if PLAN in s.user_attrs and not s.study_name.endswith(CHECKS)]


def live(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, in order: one that was retried counts where it first stood."""
    trials = study.get_trials(deepcopy=False)
    superseded = {number for t in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(t)}
    return sorted((t for t in trials if t.number not in superseded), key=_place)


def _place(trial: FrozenTrial) -> int:
    original = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if original is None else original


def fill(study: optuna.Study, points: Sequence[Values]) -> None:
    """Adds waiting trials until there are as many as ``points``; an empty point is the sampler's to choose.

    Two machines that fill at once may add too many. The surplus stays behind the last that counts, and waits.
    """
    for point in points[len(live(study)) :]:
        study.enqueue_trial(point)


def checks_of(checks: optuna.Study, chosen: FrozenTrial, roles: Sequence[Values]) -> list[FrozenTrial]:
    """The checks of a trial of the search, one for every role; those that are missing are made."""
    found = counting_checks(checks, chosen)
    missing = [role for role in roles if (role["role"], role.get("repeat")) not in found]
    for role in missing:
        about = {"of": chosen.number, "settings of": chosen.user_attrs[SETTINGS]}
        checks.enqueue_trial({}, user_attrs=role | about)
    return list((counting_checks(checks, chosen) if missing else found).values())


def counting_checks(checks: optuna.Study, chosen: FrozenTrial) -> dict[tuple[str, int | None], FrozenTrial]:
    """The checks there are of a trial, by role and repeat; of two that two machines made at once the first counts."""
    found: dict[tuple[str, int | None], FrozenTrial] = {}
    for trial in live(checks):
        if trial.user_attrs["of"] == chosen.number:
            found.setdefault((trial.user_attrs["role"], trial.user_attrs.get("repeat")), trial)
    return found


def points(definition: Definition, trials: int) -> list[Values]:
    """What the first trials are given: the study's grid, or its first point and then whatever the sampler chooses."""
    chosen = list(definition.points) or [definition.first or {}]
    return (chosen + [{}] * trials)[:trials]


def claim(study: optuna.Study, counted: Callable[[], list[FrozenTrial]], seed: int) -> optuna.Trial | None:
    """Takes the first waiting trial among those ``counted``, for this worker alone; None when none waits.

    The sampler is seeded with the study's seed and the trial's place: what it proposes depends on the trials before,
    not on how often the study was stopped.
    """
    fail_stale_trials(study)
    for waiting in (t for t in counted() if t.state == TrialState.WAITING):
        beat(study, waiting)  # before the claim, so that no claimed trial is ever without one
        try:
            if study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                mixed = np.random.SeedSequence((seed, _place(waiting))).generate_state(1)[0]
                study.sampler = TPESampler(seed=int(mixed), n_startup_trials=STARTUP)
                return optuna.Trial(study, waiting._trial_id)
        except UpdateFinishedTrialError:
            continue
    return None


def beat(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
    """A sign of life, so that nobody takes a trial that is still running."""
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


def seen_before(study: optuna.Study, number: int) -> int:
    """How many earlier trials have a trial's parameters: a setting that comes again is trained with another seed."""
    one = study.get_trials(deepcopy=False)[number]
    return sum(t.params == one.params for t in live(study) if _place(t) < _place(one))


def last_seed(study: optuna.Study, number: int) -> int:
    """The largest seed with which the search trains a trial's parameters; repeats begin behind it."""
    params = study.get_trials(deepcopy=False)[number].params
    return max(t.user_attrs[SEED] for t in live(study) if t.params == params and SEED in t.user_attrs)


def finish(study: optuna.Study, trial: optuna.Trial, figures: dict[str, float]) -> None:
    """Records a trial's figures, and its place relative to every limit; without its objectives it has failed."""
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


def give_back(study: optuna.Study, trial: optuna.Trial) -> None:
    """Ends a trial that was interrupted; the same parameters wait again."""
    fail(study, trial, "interrupted; it waits again")
    frozen = next(t for t in study.get_trials() if t.number == trial.number)
    kept = {k: v for k, v in frozen.user_attrs.items() if k != REASON}
    frozen.user_attrs = kept
    RetryHeartbeatStaleTrialCallback()(study, frozen)


def excess(figures: dict[str, float], plan: Plan) -> dict[str, float]:
    """By how much each limited figure is above its limit; infinite where it was not recorded or is no number."""
    found = {name: figures.get(name, math.nan) - most for name, most in plan.at_most.items()}
    return {name: math.inf if math.isnan(x) else x for name, x in found.items()}


def feasible(study: optuna.Study) -> list[FrozenTrial]:
    """The completed trials that keep every limit."""
    done = (t for t in live(study) if t.state == TrialState.COMPLETE)
    return [t for t in done if all(x <= 0 for x in t.constraints.values())]


def best(study: optuna.Study) -> FrozenTrial | None:
    """The one of them with the lowest first objective."""
    return min(feasible(study), key=lambda t: t.values[0], default=None)


def check_place(url: str, name: str, out: Path) -> None:
    """Refuses a storage in memory, a companion's name, and folders that cannot be made; nothing is made yet."""
    if name.endswith(CHECKS):
        raise UsageError(f"'{name}' would be the checks of another study: choose another --study-name.")
    if url in ("sqlite://", "sqlite:///", "sqlite:///:memory:"):
        raise UsageError(f"The storage {url} is in memory, where no trial would be kept: give sqlite:///FILE.")
    check_folder(out, "--out")
    if url.startswith("sqlite:///"):
        check_folder(Path(url.removeprefix("sqlite:///")).parent, "--storage")


def make_folder(url: str) -> None:
    """Makes the folder of a SQLite file."""
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
