"""A study as its file defines it: the space, how a point becomes recipe settings, and the objective."""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.configure import Values, recipe_file
from ltm_pyro.studies.search.objective import Objective, train_and_score

SHIPPED = ("rate_ratio", "latent_dims", "inference_steps", "prior_family", "scaling")
Row = dict[str, Any]  # of one trial: number, role, state, seed, parameters, figures, reason
Analysis = Callable[[list[Row]], tuple[dict[str, bytes], list[str]]]  # title to PNG, and findings


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a study file defines; only ``space`` is required.

    Args:
        source: the shipped study's name, or the file's path.
        question: the first line of the file's docstring.
        space: parameter name to Optuna distribution; a name is a recipe's key unless ``settings`` translates it.
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
        """The space as plain data, to be compared and stored."""
        return {name: json.loads(distribution_to_json(d)) for name, d in self.space.items()}

    @property
    def example(self) -> Values:
        """A point of the space, to check that a recipe takes it."""
        return self.points[0] if self.points else self.first or {n: _lowest(d) for n, d in self.space.items()}

    @property
    def tried(self) -> tuple[Values, ...]:
        """The points that are fixed beforehand, or the example."""
        return self.points or (self.example,)

    def has(self, point: Values) -> bool:
        """Whether a point, which may be from a storage that others write to, is one of the space."""
        known = point.keys() <= self.space.keys()
        return known and all(_within(value, self.space[name]) for name, value in point.items())

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
    space = getattr(module, "space", None)
    if not isinstance(space, Mapping) or not all(isinstance(d, BaseDistribution) for d in space.values()) or not space:
        raise UsageError(
            f"The study {source} defines no `space`: give a dictionary from recipe keys to Optuna distributions, "
            f"such as {{'model.inference.rate': FloatDistribution(0.05, 0.5, log=True)}}."
        )
    return Definition(
        source=str(Path(source).resolve()) if source.endswith(".py") else source,
        question=(inspect.getdoc(module) or source).splitlines()[0],
        space=space,
        settings=getattr(module, "settings", dict),
        objective=getattr(module, "objective", train_and_score),
        figures=tuple(getattr(module, "figures", ())),
        points=tuple(getattr(module, "points", ())),
        first=getattr(module, "first", None),
        checks=getattr(module, "checks", True),
        recipe=getattr(module, "recipe", recipe_file("quickstart.yaml")),
        analyse=getattr(module, "analyse", None),
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
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"The study file {path} cannot be run: {type(error).__name__}: {error}; fix it.") from None
    return module


def _within(value: Any, distribution: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high


def _lowest(distribution: Any) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low
