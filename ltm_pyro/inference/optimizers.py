"""Fast optimisers: steps on local parameters, every sequence with moments and a step count of its own.

State goes in and comes out, all of it with a leading axis B, so that sequences can stop, be stored and be taken up
again one by one; torch's optimisers share one step count among all rows of a tensor. An optimiser is told of all steps
to come, and gives an update for each. Shapes: N steps, B sequences, P parameters of each.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Moments = dict[str, Tensor]  # running averages of one parameter's gradient, by name
Rate = float | Tensor  # on the device where a recorded fit reads it
Update = Callable[[Tensor, Tensor, Moments, Rate], tuple[Tensor, Moments]]  # x, gradient, moments, factor on lr


def adam(
    counts_NB: Float[Tensor, "N B"], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Iterator[Update]:
    r"""x − lr · m̂ / (√v̂ + ε), step for step `torch.optim.Adam` (Kingma & Ba 2015, arXiv 1412.6980).

    m̂ = m / (1 − β₁^t) and v̂ = v / (1 − β₂^t), m and v the moments ``mean`` and ``square``.

    Args:
        counts_NB: t, the number of each step to come, from 1, for each sequence.
    """
    root_NB1 = (1 - betas[1] ** counts_NB[..., None]).sqrt()
    size_NB1 = lr * root_NB1 / (1 - betas[0] ** counts_NB[..., None])
    return (partial(_adam, betas, *of_step) for of_step in zip(size_NB1, eps * root_NB1, strict=True))


def _adam(
    betas: tuple[float, float],
    size_B1: Tensor,
    eps_B1: Tensor,
    x_BP: Tensor,
    gradient_BP: Tensor,
    moments: Moments,
    rate: Rate,
) -> tuple[Tensor, Moments]:
    mean = torch.lerp(gradient_BP, moments["mean"], betas[0])
    square = (moments["square"] * betas[1]).addcmul_(gradient_BP, gradient_BP, value=1 - betas[1])
    moved_BP = torch.addcdiv(x_BP, mean * (-rate * size_B1), square.sqrt().add_(eps_B1))
    return moved_BP, {"mean": mean, "square": square}


def adamw(counts_NB: Float[Tensor, "N B"], lr: float, weight_decay: float = 0.01, **more: Any) -> Iterator[Update]:
    """`adam` after x has shrunk by lr · weight_decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    def update(step: Update, x: Tensor, gradient: Tensor, moments: Moments, rate: Rate) -> tuple[Tensor, Moments]:
        return step(x * (1 - rate * lr * weight_decay), gradient, moments, rate)

    return (partial(update, step) for step in adam(counts_NB, lr, **more))


def sgd(counts_NB: Float[Tensor, "N B"], lr: float) -> Iterator[Update]:
    """x − lr · gradient."""
    return repeat(lambda x, gradient, moments, rate: (x - rate * lr * gradient, {}), len(counts_NB))


class Groups:
    """Parameters with equal optimiser arguments side by side in one tensor (B, P), so that one update moves them all.

    Args:
        like: parameters by name, each with leading axis B.
        arguments: of the optimiser, by name.
    """

    def __init__(self, like: dict[str, Tensor], arguments: Callable[[str], dict[str, Any]]) -> None:
        self.shapes = {name: x.shape[1:] for name, x in like.items()}
        self.arguments: dict[str, dict[str, Any]] = {}
        self.names: dict[str, list[str]] = {}
        for name in like:
            group = repr(sorted(arguments(name).items()))
            self.arguments[group] = arguments(name)
            self.names.setdefault(group, []).append(name)

    def join(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """By group what is given by name."""
        return {
            group: torch.cat([parts[name].reshape(len(parts[name]), -1) for name in names], dim=1)
            for group, names in self.names.items()
        }

    def split(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name what is given by group; views."""
        parts: dict[str, Tensor] = {}
        for group, names in self.names.items():
            columns = whole[group].split([self.shapes[name].numel() for name in names], dim=1)
            parts |= {name: x.view(len(x), *self.shapes[name]) for name, x in zip(names, columns, strict=True)}
        return {name: parts[name] for name in self.shapes}


class Optimizer(NamedTuple):
    """The updates of all steps to come, and the names of the moments they keep of every parameter."""

    updates: Callable[..., Iterator[Update]]
    moments: tuple[str, ...] = ()

    def init(self, x: Tensor) -> Moments:
        """The moments before the first step."""
        return {name: torch.zeros_like(x) for name in self.moments}


OPTIMIZERS = {
    "adam": Optimizer(adam, ("mean", "square")),
    "adamw": Optimizer(adamw, ("mean", "square")),
    "sgd": Optimizer(sgd),
    "natural": Optimizer(sgd),  # the guide turns the gradient first
}
