"""What a problem task is: questions with one right answer each, worked step by step, their difficulty a number."""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ltm_pyro.data.tasks.task import check_options

ANSWER = "#"  # in a worked answer, what follows it is the answer
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_Option = TypeVar("_Option")


class Choices:
    """Uniform draws, and what they cost: ``nats`` is Σ log n over all draws, each out of n.

    Where no two ways of drawing give the same text, that is −log p(text).
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self.nats = rng, 0.0

    def of(self, options: Sequence[_Option]) -> _Option:
        """One of the options."""
        self.nats += math.log(len(options))
        return options[int(self._rng.integers(len(options)))]


class Problem(NamedTuple):
    """A question and its worked answer, which ends with ``#`` and the answer; ``nats`` is −log p(both)."""

    prompt: str
    completion: str
    difficulty: int
    nats: float


class ProblemTask(ABC):
    """A law of questions, each with its worked answer, which follows from the question.

    Difficulties from ``easiest`` to ``hardest`` are for training, validation and test, and those above, up to
    ``harder``, for a split of their own. A task has options: the annotated arguments of its constructor, from which
    `ltm data make` takes its own.
    """

    easiest: int
    hardest: int
    harder: int

    @abstractmethod
    def write(self, difficulty: int, choices: Choices) -> tuple[str, str]:
        """A question of this difficulty and its worked answer; every draw is one of ``choices``."""

    def sample(self, count: int, rng: np.random.Generator, harder: bool = False) -> list[Problem]:
        """``count`` independent problems, their difficulties uniform, of those for training or of the harder ones."""
        known = range(self.hardest + 1, self.harder + 1) if harder else range(self.easiest, self.hardest + 1)
        found = []
        for _ in range(count):
            choices = Choices(rng)
            difficulty = choices.of(known)
            prompt, completion = self.write(difficulty, choices)
            found.append(Problem(prompt, completion, difficulty, choices.nats))
        return found

    def check_difficulties(self, task: str, least: int, most: int) -> None:
        """Raises `UsageError` unless ``least`` ≤ easiest ≤ hardest ≤ harder ≤ ``most``."""
        check_options(task, easiest=(self.easiest, least, most), hardest=(self.hardest, self.easiest, most))
        check_options(task, harder=(self.harder, self.hardest, most))


def worked(value: int, steps: Sequence[tuple[str, int, int]]) -> str:
    """The worked answer of a chain from ``value`` on: of each step the sign, the number and the result."""
    written = []
    for sign, number, result in steps:
        written.append(f"{value}{sign}{number}={result}")
        value = result
    return f"{';'.join(written)}{ANSWER}{value}"


def answer_of(text: str) -> str | None:
    """What a worked answer ends with, behind its last ``#``; None if there is no ``#``."""
    return text.rpartition(ANSWER)[2].strip() if ANSWER in text else None
