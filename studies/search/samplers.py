"""Optuna's samplers and pruners by name."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.extras import extra

RUNGS = (1 / 9, 1 / 3)  # fractions of the budget after which a trial may be given up; Hyperband's with a factor of 3
STARTUP = 5  # trials drawn at random before a sampler or a pruner uses the earlier ones
SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {  # of the trial's seed, and of the study's
    "tpe": lambda trial, study: optuna.samplers.TPESampler(seed=trial, n_startup_trials=STARTUP),
    "gp": lambda trial, study: optuna.samplers.GPSampler(seed=trial, n_startup_trials=STARTUP),
    "cmaes": lambda trial, study: optuna.samplers.CmaEsSampler(
        seed=trial, n_startup_trials=STARTUP, warn_independent_sampling=False
    ),
    "qmc": lambda trial, study: optuna.samplers.QMCSampler(
        seed=study, scramble=True, warn_asynchronous_seeding=False, warn_independent_sampling=False
    ),
    "random": lambda trial, study: optuna.samplers.RandomSampler(seed=trial),
    "grid": lambda trial, study: optuna.samplers.RandomSampler(seed=trial),  # its points are fixed beforehand
    "nsga2": lambda trial, study: optuna.samplers.NSGAIISampler(seed=trial, population_size=20),
    "nsga3": lambda trial, study: optuna.samplers.NSGAIIISampler(seed=trial, population_size=20),
}
PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "hyperband": lambda: optuna.pruners.HyperbandPruner(1, round(1 / RUNGS[0]), 3),
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
    "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=4),
}


def make_sampler(name: str, trial: int, study: int) -> BaseSampler:
    """A sampler by name, with the seeds of one trial and of the study."""
    if name == "cmaes":
        extra("cmaes", "studies", "The sampler cmaes")
    with _without_warnings():
        return SAMPLERS[name](trial, study)


def make_pruner(name: str) -> BasePruner:
    """A pruner by name."""
    with _without_warnings():
        return PRUNERS[name]()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without Optuna's word that one of them is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def check_name_of(kind: str, name: str, known: Mapping[str, object]) -> None:
    """Refuses a name that there is not, with the nearest that there is."""
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"There is no {kind} {name!r}{hint}: choose from {', '.join(known)}.")
