"""What a task is: sequences of numbers whose law is known, so that the best possible prediction is known as well.

Shapes: N sequences, T tokens, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.errors import UsageError

_ROWS = 4096  # sequences that are scored together; tables of a task are some kilobytes a sequence


class Task(ABC):
    """A law p(x) of sequences x of T numbers from 0 to V − 1, and what the best prediction of every number costs.

    A task has options: the annotated arguments of its constructor, from which `ltm data make` takes its own.

    Attributes:
        vocabulary: V
        length: T
    """

    vocabulary: int
    length: int

    @abstractmethod
    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""

    @abstractmethod
    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t) of every token, r = ``reach``; all tokens before it where that is None.

        The sum over a sequence is −log p(x) if ``reach`` is None, and infinite where x cannot occur. With r = 0 only
        the position t is known. Raises `UsageError` where it cannot be computed.
        """

    def sequence_nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, " N"]:
        """Σ_t −log p(x_t | x_{t−r} … x_{t−1}, t), in nats per sequence."""
        if reach is not None and reach >= self.length:
            reach = None
        parts = [self.nats(tokens_NT[n : n + _ROWS], reach).sum(1) for n in range(0, len(tokens_NT), _ROWS)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def best_within(self, reach: int | None = None, sequences: int = 20_000, seed: int = 0) -> tuple[float, float]:
        """E_p[Σ_t −log p(x_t | x_{t−r} … x_{t−1}, t)] in nats per sequence, and its standard error: by Monte Carlo.

        No model whose tokens see only the r tokens before them, and their position, can have less on average.
        """
        nats_N = self.sequence_nats(self.sample(sequences, np.random.default_rng(seed)), reach)
        return float(nats_N.mean()), float(nats_N.std(ddof=1) / math.sqrt(sequences))


TASKS: dict[str, Callable[..., Any]] = {}  # a `Task` or a `ProblemTask`
_Found = TypeVar("_Found", bound=Callable[..., Any])


def register_task(name: str) -> Callable[[_Found], _Found]:
    """A decorator: the class, or function that returns a task, is then known to `ltm data make` as ``name``."""

    def register(found: _Found) -> _Found:
        if TASKS.get(name, found) is not found:
            raise UsageError(f"There is a task {name!r} already: choose another name.")
        TASKS[name] = found
        return found

    return register


def check_options(task: str, **ranges: tuple[Any, Any, Any]) -> None:
    """Raises `UsageError` unless every option, a value with its lowest and highest, is in its range."""
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            limits = f"at least {low}" if high in (math.inf, None) else f"from {low} to {high}"
            raise UsageError(f"The task {task} has --{name.replace('_', '-')} {value}: give a number {limits}.")
