"""Learning rates: parameter names to optimiser arguments, and how rates move over a fit and over training."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ltm_pyro.contracts import Guide, Model

Points = list[tuple[float, float]]  # (fraction of training, value)
Rates = Callable[[str], dict[str, Any]]  # parameter name -> optimiser arguments, as pyro.optim takes it


def parameter_groups(named: Iterable[tuple[str, Tensor]], rates: Rates) -> list[dict[str, Any]]:
    """Optimiser groups in which parameters with equal arguments stand together, for one fused optimiser over all."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        arguments = rates(name)
        group = groups.setdefault(repr(sorted(arguments.items())), {"params": [], **arguments})
        group["params"].append(parameter)
    return list(groups.values())


def slow_parameters(model: Model, guide: Guide) -> list[tuple[str, nn.Parameter]]:
    """What the slow step learns, by name: the model's parameters, and those of a guide that is a module."""
    learned = guide.named_parameters(prefix="guide") if isinstance(guide, nn.Module) else ()
    return [*model.named_parameters(), *learned]


def decay(weight_decay: float) -> Rates:
    """``weight_decay`` for the decoder's matrices, none for norms, priors and guides: what is pulled towards zero."""
    return lambda name: {
        "weight_decay": 0.0 if "norm" in name or name.startswith(("prior.", "guide.")) else weight_decay
    }


def cosine(step: int, steps: int) -> float:
    """(1 + cos(π step / steps)) / 2: from 1 to nearly 0 within one fit."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def interpolate(points: Points, progress: float) -> float:
    """The value at a fraction of training on the straight lines between (progress, value) points; flat outside."""
    return float(np.interp(progress, [x for x, _ in points], [y for _, y in points]))


def warmup_cosine(progress: float, warmup: float, floor: float) -> float:
    """Rises linearly over the fraction ``warmup`` of training, then falls as a cosine to ``floor`` times the peak."""
    if progress < warmup:
        return progress / warmup
    after = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * after)) / 2
