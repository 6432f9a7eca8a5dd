"""The task `permutation`: a function to be learned from its values, a new one in every sequence."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task


@register_task("permutation")
@dataclass
class Permutation(Task):
    """x₁ f(x₁) x₂ f(x₂) …: f a uniform permutation of n symbols, new in each sequence, every x uniform and independent.

    A symbol costs log n. Its image costs nothing if the pair was seen before, else log(n − d), d different pairs seen:
    f(x) is uniform over the values not yet used. A value whose symbol lies outside the reach says nothing.

    Args:
        symbols: n, symbols that are permuted
        pairs: pairs of symbol and image in a sequence
    """

    symbols: int = 6
    pairs: int = 24

    def __post_init__(self) -> None:
        check_options("permutation", symbols=(self.symbols, 2, 1_000), pairs=(self.pairs, 1, 100_000))
        self.vocabulary, self.length = self.symbols, 2 * self.pairs

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""
        f_Nn = rng.permuted(np.tile(np.arange(self.symbols), (count, 1)), axis=1)
        x_NP = rng.integers(0, self.symbols, (count, self.pairs))
        return np.stack([x_NP, np.take_along_axis(f_Nn, x_NP, 1)], 2).reshape(count, self.length)

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t), exactly."""
        n, rows = self.symbols, np.arange(len(tokens_NT))
        nats_NT = np.full(tokens_NT.shape, math.log(n))
        if reach == 0:
            return nats_NT
        seen = self.pairs if reach is None else (reach - 1) // 2  # pairs before a symbol whose image is asked for
        image_Nn = np.zeros((len(rows), n), np.int64)
        pairs_Nn, values_Nn = np.zeros_like(image_Nn), np.zeros_like(image_Nn)  # how often they are within reach
        for pair in range(self.pairs):
            x_N, y_N = tokens_NT[:, 2 * pair], tokens_NT[:, 2 * pair + 1]
            left_N = n - (values_Nn > 0).sum(1)
            known_N = pairs_Nn[rows, x_N] > 0
            possible_N = np.where(known_N, image_Nn[rows, x_N] == y_N, values_Nn[rows, y_N] == 0)
            cost_N = np.where(known_N, 0.0, np.log(np.maximum(left_N, 1)))
            nats_NT[:, 2 * pair + 1] = np.where(possible_N, cost_N, math.inf)
            image_Nn[rows, x_N] = y_N
            pairs_Nn[rows, x_N] += 1
            values_Nn[rows, y_N] += 1
            if pair >= seen:
                gone = pair - seen
                pairs_Nn[rows, tokens_NT[:, 2 * gone]] -= 1
                values_Nn[rows, tokens_NT[:, 2 * gone + 1]] -= 1
        return nats_NT

    def best_within(self, reach: int | None = None, sequences: int = 0, seed: int = 0) -> tuple[float, float]:
        """The expectation, by recursion over the number of different pairs within reach, and 0 for its error."""
        n, seen = self.symbols, self.pairs if reach is None else max(0, reach - 1) // 2
        nats, p_d = self.pairs * math.log(n), np.eye(n + 1)[0]  # p(d) with as many pairs within reach as there are
        left_d = n - np.arange(n + 1)
        for pair in range(self.pairs):
            nats += p_d @ (left_d / n * np.log(np.maximum(left_d, 1))) if reach != 0 else math.log(n)
            if pair < seen:
                p_d = p_d * (1 - left_d / n) + np.append(0, (p_d * left_d / n)[:-1])
        return float(nats), 0.0
