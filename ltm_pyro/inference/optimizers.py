"""Optimisers of local parameters: like torch's, but with moments and a step count per sequence.

They are pure functions of a state whose tensors have a leading axis B, so that single sequences can be stopped, stored
and continued; torch's optimisers have one step count for all rows of a tensor.
Shapes: N steps, B sequences, P parameters of each.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from itertools import repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ltm_pyro.contracts import LocalParameters
from ltm_pyro.inference.learning_rates import LOCAL, Rates, check_rates
from ltm_pyro.inference.state import LocalState, Moments

Rate = float | Tensor  # a tensor on the device if a CUDA graph reads it
TensorUpdate = Callable[[Tensor, Tensor, Moments, Rate], tuple[Tensor, Moments]]  # x, gradient, moments, factor on lr
Update = Callable[[LocalState, LocalParameters], LocalState]  # state and gradients of one fast step -> the next state


def adam(
    counts_NB: Float[Tensor, "N B"], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Iterator[TensorUpdate]:
    r"""x − lr · m̂ / (√v̂ + ε), the same as `torch.optim.Adam` (Kingma & Ba 2015, arXiv 1412.6980).

    m̂ = m / (1 − β₁^t) and v̂ = v / (1 − β₂^t), where m and v are the moments ``mean`` and ``square``. The bias
    corrections of all steps are computed at once.

    Args:
        counts_NB: t, the step counts of the next N steps of each sequence, from 1.
    """
    root_NB1 = (1 - betas[1] ** counts_NB[..., None]).sqrt()
    size_NB1 = lr * root_NB1 / (1 - betas[0] ** counts_NB[..., None])
    eps_NB1 = eps * root_NB1

    def update(size_B1: Tensor, eps_B1: Tensor, x_BP: Tensor, gradient_BP: Tensor, moments: Moments, rate: Rate) -> Any:
        mean = torch.lerp(gradient_BP, moments["mean"], betas[0])
        square = (moments["square"] * betas[1]).addcmul_(gradient_BP, gradient_BP, value=1 - betas[1])
        new_BP = torch.addcdiv(x_BP, mean * (-rate * size_B1), square.sqrt().add_(eps_B1))
        return new_BP, {"mean": mean, "square": square}

    return (partial(update, size_B1, eps_B1) for size_B1, eps_B1 in zip(size_NB1, eps_NB1, strict=True))


def adamw(
    counts_NB: Float[Tensor, "N B"], lr: float, weight_decay: float = 0.01, **options: Any
) -> Iterator[TensorUpdate]:
    """x · (1 − lr · weight_decay), then `adam` (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    def update(step: TensorUpdate, x: Tensor, gradient: Tensor, moments: Moments, rate: Rate) -> Any:
        return step(x * (1 - rate * lr * weight_decay), gradient, moments, rate)

    return (partial(update, step) for step in adam(counts_NB, lr, **options))


def sgd(counts_NB: Float[Tensor, "N B"], lr: float) -> Iterator[TensorUpdate]:
    """x − lr · gradient."""
    return repeat(lambda x, gradient, moments, rate: (x - rate * lr * gradient, {}), len(counts_NB))


class Optimizer(NamedTuple):
    """An optimiser of local parameters: the names of its moments, and its update of one tensor."""

    tensor_updates: Callable[..., Iterator[TensorUpdate]]
    moments: tuple[str, ...] = ()

    def init(self, parameters: LocalParameters) -> dict[str, Moments]:
        """The moments before the first step."""
        return {name: {kind: torch.zeros_like(x) for kind in self.moments} for name, x in parameters.items()}

    def check(self, rates: Rates, parameters: LocalParameters) -> None:
        """Raises `UsageError` for arguments without ``lr``, or that the optimiser does not know (`check_rates`)."""
        accepted = [*signature(self.tensor_updates).parameters.values()][1:]
        known = None if any(x.kind is x.VAR_KEYWORD for x in accepted) else [x.name for x in accepted]
        check_rates(rates, [LOCAL + name for name in parameters], known)

    def updates(self, state: LocalState, factors: list[Rate], rates: Rates) -> Iterator[Update]:
        """The updates of the next steps from ``state``, one per factor.

        Parameters with equal optimiser arguments are concatenated to one tensor (B, P), so that an operation is one
        kernel instead of one per parameter, as in torch's fused optimisers.

        Args:
            factors: the factor on the learning rate at each step.
            rates: optimiser arguments by parameter name, before which is `LOCAL`.
        """
        groups: dict[str, list[str]] = {}
        for name in state.parameters:
            groups.setdefault(repr(sorted(rates(LOCAL + name).items())), []).append(name)
        counts_NB = state.steps_B + torch.arange(1, len(factors) + 1, device=state.steps_B.device)[:, None]
        updates_of_groups = [
            self.tensor_updates(counts_NB.to(state.parameters[names[0]].dtype), **rates(LOCAL + names[0]))
            for names in groups.values()
        ]
        for factor, steps_B, *tensor_updates in zip(factors, counts_NB, *updates_of_groups, strict=True):
            yield partial(self._update, list(groups.values()), tensor_updates, factor, steps_B)

    def _update(
        self,
        groups: list[list[str]],
        tensor_updates: list[TensorUpdate],
        factor: Rate,
        steps_B: Tensor,
        state: LocalState,
        gradients: LocalParameters,
    ) -> LocalState:
        parameters, moments = dict(state.parameters), {name: dict(m) for name, m in state.moments.items()}
        for names, tensor_update in zip(groups, tensor_updates, strict=True):
            moments_BP = {kind: _concatenate([moments[name][kind] for name in names]) for kind in self.moments}
            x_BP = _concatenate([parameters[name] for name in names])
            gradient_BP = _concatenate([gradients[name] for name in names])
            x_BP, moments_BP = tensor_update(x_BP, gradient_BP, moments_BP, factor)
            shapes = {name: parameters[name].shape for name in names}
            parameters |= _split(x_BP, shapes)
            for kind, moment_BP in moments_BP.items():
                for name, moment in _split(moment_BP, shapes).items():
                    moments[name][kind] = moment
        return state._replace(parameters=parameters, moments=moments, steps_B=steps_B)


def _concatenate(tensors: list[Tensor]) -> Float[Tensor, "B P"]:
    return torch.cat([x.flatten(1) if x.dim() > 1 else x[:, None] for x in tensors], dim=1)


def _split(x_BP: Float[Tensor, "B P"], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    columns = x_BP.split([shape[1:].numel() for shape in shapes.values()], dim=1)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), columns, strict=True)}


OPTIMIZERS = {
    "adam": Optimizer(adam, ("mean", "square")),
    "adamw": Optimizer(adamw, ("mean", "square")),
    "sgd": Optimizer(sgd),
    "natural": Optimizer(sgd),  # `step` gives it the natural gradient
}
