"""Schedules over training: the slow learning rate, and the settings of local inference."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import Any

from ltm_pyro.contracts import Init
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.learning_rates import Points, decay, interpolate
from ltm_pyro.inference.state import LocalInference

Cost = Callable[[LocalInference], float]


@dataclass(frozen=True, kw_only=True)
class SlowRate:
    """AdamW on the global parameters: decoder, prior and encoder (arXiv 2502.01567, algorithm 1, the outer step).

    Args:
        rate: η_slow, the peak learning rate.
        prior_rate: the same for the prior's parameters; ``rate`` when not given.
        warmup: fraction of training over which the rate rises from 0.
        floor: where the cosine ends, as a fraction of the peak.
        weight_decay: on the decoder's matrices; norms have none.
        betas: Adam's averaging factors.
    """

    rate: float = 4e-4
    prior_rate: float | None = None
    warmup: float = 0.02
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def arguments(self, name: str) -> dict[str, Any]:
        """The optimiser's arguments for a parameter."""
        rate = self.prior_rate if self.prior_rate is not None and name.startswith("prior.") else self.rate
        return {"lr": rate, **decay(self.weight_decay)(name)}

    def __post_init__(self) -> None:
        rates = (self.rate, self.rate if self.prior_rate is None else self.prior_rate)
        factors = (*self.betas, self.warmup)
        finite = all(0 < x < inf for x in rates) and 0 <= self.weight_decay < inf
        if not (finite and all(0 <= x < 1 for x in factors) and 0 <= self.floor <= 1):
            raise UsageError(
                f"`slow` needs rate > 0, weight_decay ≥ 0, warmup and betas in [0, 1) and floor in [0, 1], got {self}."
            )


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Schedules over training: (progress, value) points with straight lines between; None keeps local inference's own.

    Args:
        steps: T_fast, rounded; while it is 0 the decoder trains without thoughts (the autoregressive warm start).
        rate: the fast rate (the paper's: 0.3 to 0.34).
        log_var: log-variance of the initial q, relative to the prior's (narrow to prior: −5 to 0).
        kl_weight: of the KL in the objective.
        particles: draws of z per fast step, rounded.
        flops_per_token: T_fast from a budget: the most fast steps, at least one, for these FLOPs per trained token.
    """

    steps: Points | None = None
    rate: Points | None = None
    log_var: Points | None = None
    kl_weight: Points | None = None
    particles: Points | None = None
    flops_per_token: Points | None = None

    def __post_init__(self) -> None:
        for name, points in asdict(self).items():
            if not all(isfinite(number) for point in points or () for number in point):
                raise UsageError(f"`curriculum.{name}` is {points}: give finite numbers.")
            places = [progress for progress, _ in points or ()]
            if points is not None and (not places or places != sorted(places)):
                raise UsageError(f"`curriculum.{name}` is {points}: give points whose progress rises, at least one.")
            for _, value in points or ():  # now, and not when the training gets there
                if name == "log_var":
                    Init(log_var=value)
                elif name == "flops_per_token" and value < 0:
                    raise UsageError(f"`curriculum.{name}` is {points}: give FLOPs of 0 or more.")
                elif name != "flops_per_token":
                    LocalInference(**{name: round(value) if name in ("steps", "particles") else value})
        if self.steps and self.flops_per_token:
            raise UsageError("`curriculum` has both steps and flops_per_token, which each decide T_fast: give one.")

    def at(self, progress: float, inference: LocalInference, cost: Cost) -> LocalInference:
        """Local inference at a fraction of training; ``cost`` gives its FLOPs per token."""
        values: dict[str, Any] = {
            name: interpolate(points, progress) for name, points in asdict(self).items() if points
        }
        budget = values.pop("flops_per_token", None)
        if "log_var" in values:
            values["init"] = replace(inference.init, log_var=values.pop("log_var"))
        values.update({name: round(values[name]) for name in ("steps", "particles") if name in values})
        now = replace(inference, **values)
        if budget is not None:
            one, two = (cost(replace(now, steps=steps)) for steps in (1, 2))
            now = replace(now, steps=max(1, 1 + int((budget - one) // (two - one)) if two > one else 1))
        return now if now.steps else replace(now, init=Init(), use_thoughts=False)  # q is the prior
