"""The task `copy`: a string that has to be said again."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task


@register_task("copy")
@dataclass
class Copy(Task):
    """x₁ … x_n # x₁ … x_n: a string of n symbols, uniform and independent, a separator, and the string once more.

    A symbol costs log m the first time; the second time nothing if n + 1 tokens are within reach, else log m as well:
    in between, a token is independent of all that it sees. The separator # is the number m, and costs nothing.

    Args:
        symbols: m, symbols to choose from
        string: n, symbols of the string
    """

    symbols: int = 8
    string: int = 16

    def __post_init__(self) -> None:
        check_options("copy", symbols=(self.symbols, 1, 100_000), string=(self.string, 1, 2**20))
        self.vocabulary, self.length = self.symbols + 1, 2 * self.string + 1

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""
        string_Nn = rng.integers(0, self.symbols, (count, self.string))
        return np.concatenate([string_Nn, np.full((count, 1), self.symbols), string_Nn], 1)

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t), exactly."""
        n, sees = self.string, reach is None or reach > self.string
        nats_NT = np.where(tokens_NT < self.symbols, math.log(self.symbols), math.inf)
        nats_NT[:, n] = np.where(tokens_NT[:, n] == self.symbols, 0.0, math.inf)
        if sees:
            nats_NT[:, n + 1 :] = np.where(tokens_NT[:, n + 1 :] == tokens_NT[:, :n], 0.0, math.inf)
        return nats_NT

    def best_within(self, reach: int | None = None, sequences: int = 0, seed: int = 0) -> tuple[float, float]:
        """n log m or 2 n log m: every sequence costs the same."""
        said = 1 if reach is None or reach > self.string else 2
        return said * self.string * math.log(self.symbols), 0.0
