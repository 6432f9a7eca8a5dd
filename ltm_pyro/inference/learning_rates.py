"""Learning rates: optimiser arguments by parameter name, and learning-rate schedules."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ltm_pyro.contracts import Guide, Model
from ltm_pyro.errors import UsageError

Points = list[tuple[float, float]]  # (fraction of training, value)
Rates = Callable[[str], dict[str, Any]]  # parameter name -> optimiser arguments, as in pyro.optim
LOCAL = "local."  # in front of the names of q's parameters, which are those of sites, and sites have any name


def parameter_groups(named: Iterable[tuple[str, Tensor]], rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimiser: parameters with equal arguments are in one group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        arguments = rates(name)
        group = groups.setdefault(repr(sorted(arguments.items())), {"params": [], **arguments})
        group["params"].append(parameter)
    return list(groups.values())


def check_rates(rates: Rates, names: Iterable[str], known: Collection[str] | None = None) -> None:
    """Raises `UsageError` unless ``rates`` gives every name an ``lr``, and only arguments that are ``known``."""
    for name in names:
        arguments = rates(name)
        if not isinstance(arguments, Mapping) or "lr" not in arguments:
            raise UsageError(f"The rates give {name} {arguments!r}, without lr: give it, such as {{'lr': 4e-4}}.")
        if known is not None and (unknown := [key for key in arguments if key not in known]):
            raise UsageError(
                f"The rates give {name} the argument {unknown[0]!r}, which its optimizer does not know: choose from "
                f"{', '.join(known)}."
            )
        if not isinstance(lr := arguments["lr"], int | float | Tensor) or not 0 <= lr < math.inf:
            raise UsageError(f"The rates give {name} the lr {lr!r}: give a finite number that is not negative.")


def slow_parameters(model: Model, guide: Guide) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the slow step trains, by name: the model's, and those of a guide that is a module."""
    of_guide = guide.named_parameters(prefix="guide") if isinstance(guide, nn.Module) else ()
    return [*model.named_parameters(), *of_guide]


def decay(weight_decay: float) -> Rates:
    """``weight_decay`` for the decoder's matrices; 0 for its norms, for priors and for guides."""
    return lambda name: {
        "weight_decay": 0.0 if "norm" in name or name.startswith(("prior.", "guide.")) else weight_decay
    }


def cosine(step: int, steps: int) -> float:
    """(1 + cos(π step / steps)) / 2: falls from 1 to nearly 0 within one fit."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def interpolate(points: Points, progress: float) -> float:
    """Linear interpolation of (progress, value) points at a fraction of training; constant outside."""
    return float(np.interp(progress, [x for x, _ in points], [y for _, y in points]))


def warmup_cosine(progress: float, warmup: float, floor: float) -> float:
    """A factor on the rate: linear to 1 over the fraction ``warmup`` of training, then a cosine down to ``floor``."""
    if progress < warmup:
        return progress / warmup
    after = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * after)) / 2
