"""A study as its file defines it: the space, how a point becomes recipe settings, and the objective."""

import importlib
import importlib.util
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values, recipe_file
from ltm_pyro.studies.search.objective import Objective, train_and_score

SHIPPED = ("rate_ratio", "latent_dims", "inference_steps", "prior_family", "scaling")
NAMES = (  # that a study's file may define
    *("space", "suggest", "settings", "objective", "figures", "points", "first", "checks", "recipe", "analyse"),
)
Suggest = Callable[[Any], Values]
Row = dict[str, Any]  # of one trial: number, role, state, seed, parameters, figures, reason
Analysis = Callable[[list[Row]], tuple[dict[str, bytes], list[str]]]  # title to PNG, and findings


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a study file defines; only ``space`` or ``suggest`` is required.

    Args:
        source: the shipped study's name, or the file's path.
        question: the first line of the file's docstring.
        space: parameter name to Optuna distribution; a name is a recipe's key unless ``settings`` translates it.
        suggest: in place of ``space``: takes an Optuna trial and returns its parameters, some of which it may suggest
            only for some values of others.
        settings: a point of the space as recipe settings (dotted key to value).
        objective: trains and scores one `Setting`; returns named figures.
        figures: further names of figures, beside those of `train_and_score`, to minimise or limit.
        points: the points to try, if they are fixed beforehand (a grid); then none are sampled.
        first: a point to try first, for example the recipe's own.
        checks: whether the best setting is trained again, and a baseline beside it.
        recipe: the base recipe's file, if the user gives none.
        analyse: what the report adds: pictures and sentences, from the trials' rows.
    """

    source: str
    question: str
    space: Mapping[str, BaseDistribution]
    suggest: Suggest | None
    settings: Callable[[Values], Values]
    objective: Objective
    figures: tuple[str, ...]
    points: tuple[Values, ...]
    first: Values | None
    checks: bool
    recipe: str
    analyse: Analysis | None

    @property
    def described(self) -> dict[str, Any]:
        """The space as plain data, to be compared and stored; of ``suggest`` its text."""
        if self.suggest:
            return {"suggest": inspect.getsource(self.suggest)}
        return {name: json.loads(distribution_to_json(d)) for name, d in self.space.items()}

    @property
    def example(self) -> Values:
        """A point of the space, to check that a recipe takes it."""
        if self.points or self.first:
            return self.points[0] if self.points else cast(Values, self.first)
        return self._samples[0] if self.suggest else {n: _lowest(d) for n, d in self.space.items()}

    @property
    def tried(self) -> tuple[Values, ...]:
        """The points that are fixed beforehand, or the example; of a conditional space several."""
        samples = self._samples if self.suggest and not self.points else ()
        return (*(self.points or (self.example,)), *samples)

    @cached_property
    def _samples(self) -> tuple[Values, ...]:
        """Points of a conditional space, drawn at random."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        return tuple(self.choose(study.ask()) for _ in range(8))

    def choose(self, trial: optuna.Trial | optuna.trial.FixedTrial) -> Values:
        """The parameters of a trial, from the sampler."""
        if not self.suggest:
            return {name: trial._suggest(name, d) for name, d in self.space.items()}
        try:
            found = self.suggest(trial)
        except Exception as error:
            raise UsageError(
                f"`suggest` of the study {self.source} fails: {type(error).__name__}: {error}; fix it."
            ) from error
        if not isinstance(found, Mapping):
            raise UsageError(f"`suggest` of the study {self.source} returns {found!r}: let it return the parameters.")
        return {**trial.params, **found}

    def misfit(self, point: Values) -> str | None:
        """Why a point, which may be from a storage that others write to, is none of the space; None if it is one."""
        space = self.space
        if self.suggest:
            fixed = optuna.trial.FixedTrial(point)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of a value out of range, which is told below
                    self.suggest(fixed)
            except Exception as error:
                return f"`suggest` fails there ({error})"
            space = fixed.distributions
        return why_outside(point, space)

    def has(self, point: Values) -> bool:
        """Whether a point is one of the space."""
        return self.misfit(point) is None

    def options(self, point: Values) -> Values:
        """A point as recipe settings; `UsageError` if the study's own function fails."""
        try:
            return self.settings(point)
        except Exception as error:
            raise UsageError(
                f"`settings` of the study {self.source} fails at {point}: {type(error).__name__}: {error}; fix it."
            ) from error


def load_definition(source: str) -> Definition:
    """A shipped study by name, or a Python file by path. Raises `UsageError`."""
    module = _module(source)
    _check_names(module, source)
    space, suggest = getattr(module, "space", {}), getattr(module, "suggest", None)
    is_space = isinstance(space, Mapping) and all(isinstance(d, BaseDistribution) for d in space.values())
    if not is_space or not (space or callable(suggest)):
        raise UsageError(
            f"The study {source} defines no `space`: give a dictionary from recipe keys to Optuna distributions, "
            f"such as {{'model.inference.rate': FloatDistribution(0.05, 0.5, log=True)}}."
        )
    if space and suggest:
        raise UsageError(f"The study {source} defines both `space` and `suggest`: give one.")
    for name, distribution in space.items():
        odd = [x for x in getattr(distribution, "choices", ()) if not isinstance(x, str | int | float | None)]
        if odd:
            raise UsageError(
                f"The choice {odd[0]!r} of {name} in {source} would come back from a storage as something else: give "
                f"texts, numbers, truth values or None, and translate them in `settings`."
            )
    return Definition(
        source=str(Path(source).resolve()) if source.endswith(".py") else source,
        question=(inspect.getdoc(module) or source).splitlines()[0],
        space=space,
        suggest=suggest,
        settings=getattr(module, "settings", dict),
        objective=getattr(module, "objective", train_and_score),
        figures=tuple(getattr(module, "figures", ())),
        points=tuple(getattr(module, "points", ())),
        first=getattr(module, "first", None),
        checks=getattr(module, "checks", True),
        recipe=getattr(module, "recipe", recipe_file("prose.yaml")),
        analyse=getattr(module, "analyse", None),
    )


def grid_of(definition: Definition) -> Definition:
    """The same study with all combinations of its space as its points, each number at its step or choice."""
    values: dict[str, list[Any]] = {}
    for name, d in definition.space.items():
        if isinstance(d, CategoricalDistribution):
            values[name] = list(d.choices)
        elif isinstance(d, IntDistribution | FloatDistribution) and d.step and not d.log:
            values[name] = [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
        else:
            raise UsageError(f"The sampler grid needs choices or a `step` of {name}, not {_range(d)}: give one.")
    if definition.suggest:
        raise UsageError("The sampler grid needs a `space`: a conditional one has no grid; choose another sampler.")
    combinations = product(*values.values())
    return replace(definition, points=tuple(dict(zip(values, each, strict=True)) for each in combinations))


def _check_names(module: ModuleType, source: str) -> None:
    """Refuses a name of the file's own that is nearly one that counts, and would be passed over."""
    here = (module.__name__, "builtins")
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", here[0]) in here]
    for name in (name for name in own if not name.startswith("_") and name not in NAMES):
        if near := get_close_matches(name, NAMES, 1, 0.85):
            raise UsageError(
                f"The study {source} defines `{name}`, which means nothing here (did you mean `{near[0]}`?)."
            )


def _module(source: str) -> ModuleType:
    if source in SHIPPED:
        return importlib.import_module(f"ltm_pyro.studies.{source}")
    path = Path(source)
    if path.suffix != ".py":
        raise UsageError(f"There is no study '{source}': choose from {', '.join(SHIPPED)}, or give a Python file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"There is no study file at {path}: give one that defines `space`.")
    module = importlib.util.module_from_spec(spec)
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # for files beside it
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Choices for a categorical", UserWarning)  # refused below, by name
            spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"The study file {path} cannot be run: {type(error).__name__}: {error}; fix it.") from None
    return module


def why_outside(point: Values, space: Mapping[str, BaseDistribution], partial: bool = False) -> str | None:
    """Why a point is none of a space, None if it is one; a ``partial`` one may leave parameters out."""
    if unknown := point.keys() - space.keys():
        near = get_close_matches(min(unknown), space, 1)
        return f"'{min(unknown)}' is no parameter of it" + (f" (did you mean '{near[0]}'?)" if near else "")
    if not partial and (missing := space.keys() - point.keys()):
        return f"'{min(missing)}' is missing"
    wrong = next((name for name, value in point.items() if not _within(value, space[name])), None)
    return wrong and f"{wrong} is {point[wrong]!r}, not within {_range(space[wrong])}"


def _within(value: Any, distribution: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(value is x or (value == x and type(value) is type(x)) for x in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    whole = isinstance(distribution, FloatDistribution) or float(value).is_integer()
    return whole and distribution._contains(distribution.to_internal_repr(value))


def _range(distribution: Any) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(repr, distribution.choices))
    step = f" in steps of {distribution.step}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low} to {distribution.high}{step}"


def _lowest(distribution: Any) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low
