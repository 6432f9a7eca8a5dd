"""Fast optimisers: one step on local parameters, every sequence with moments and a step count of its own.

State goes in and comes out, all of it with a leading axis B, so that sequences can stop, be stored and be taken up
again one by one; torch's optimisers share one step count among all rows of a tensor. Shapes: B sequences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Moments = dict[str, Tensor]  # running averages of one parameter's gradient, by name
Rate = float | Tensor  # on the device where a recorded fit reads it


def adam(
    x: Tensor,
    gradient: Tensor,
    moments: Moments,
    count_B: Int[Tensor, " B"],
    lr: Rate,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Moments]:
    r"""x − lr · m̂ / (√v̂ + ε), step for step `torch.optim.Adam` (Kingma & Ba 2015, arXiv 1412.6980).

    Args:
        count_B: this step's number for each sequence, from 1.
    """
    mean = torch.lerp(gradient, moments["mean"], betas[0])
    square = (moments["square"] * betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    count = count_B.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    scale = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
    return torch.addcdiv(x, mean * (-lr / (1 - betas[0] ** count)), scale), {"mean": mean, "square": square}


def adamw(
    x: Tensor, gradient: Tensor, moments: Moments, count_B: Tensor, lr: Rate, weight_decay: float = 0.01, **more: Any
) -> tuple[Tensor, Moments]:
    """`adam` after x has shrunk by lr · weight_decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    return adam(x * (1 - lr * weight_decay), gradient, moments, count_B, lr, **more)


def sgd(x: Tensor, gradient: Tensor, moments: Moments, count_B: Tensor, lr: Rate) -> tuple[Tensor, Moments]:
    """x − lr · gradient."""
    return x - lr * gradient, {}


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
    """An update, and the names of the moments it keeps of every parameter."""

    update: Callable[..., tuple[Tensor, Moments]]
    moments: tuple[str, ...] = ()

    def begin(self, x: Tensor) -> Moments:
        """The moments before the first step."""
        return {name: torch.zeros_like(x) for name in self.moments}


OPTIMIZERS = {
    "adam": Optimizer(adam, ("mean", "square")),
    "adamw": Optimizer(adamw, ("mean", "square")),
    "sgd": Optimizer(sgd),
    "natural": Optimizer(sgd),  # the guide turns the gradient first
}
