"""The task `recall`: key–value pairs, and questions about them.

Shapes: N sequences, R = P + Q pairs, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task


@register_task("recall")
@dataclass
class Recall(Task):
    """k₁ v₁ … k_P v_P q₁ a₁ … q_Q a_Q: P different keys out of n, in uniform order, with values uniform and
    independent; then questions, each uniform among the P keys and independent, with the key's value as the answer.

    Keys are the numbers 0 … n − 1, values n … n + m − 1. With everything in reach, the i-th key costs log(n − i + 1), a
    value log m, a question log P and an answer nothing. Within a reach of r tokens a question costs log P if its key is
    there, else log((n − d) P / (P − d)) with d different keys there; an answer costs nothing if its pair is there.
    Otherwise it is uniform, but for a value in reach whose key is just out of reach: with probability
    1 / (m c + P − s − u) that is the key asked for. There s pairs of the first part are in reach, and u keys only as
    questions, c of these with that value.

    Args:
        keys: n, keys to choose from
        values: m, values to choose from
        pairs: P, key-value pairs that are shown
        queries: Q, questions
    """

    keys: int = 16
    values: int = 16
    pairs: int = 8
    queries: int = 8

    def __post_init__(self) -> None:
        check_options("recall", keys=(self.keys, 1, 1_000), values=(self.values, 1, 1_000))
        check_options("recall", pairs=(self.pairs, 1, self.keys), queries=(self.queries, 0, 100_000))
        self.vocabulary, self.length = self.keys + self.values, 2 * (self.pairs + self.queries)

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""
        keys_NP = rng.random((count, self.keys)).argsort(1)[:, : self.pairs]
        values_NP = self.keys + rng.integers(0, self.values, (count, self.pairs))
        asked_NQ = rng.integers(0, self.pairs, (count, self.queries))
        keys = np.concatenate([keys_NP, np.take_along_axis(keys_NP, asked_NQ, 1)], 1)
        values = np.concatenate([values_NP, np.take_along_axis(values_NP, asked_NQ, 1)], 1)
        return np.stack([keys, values], 2).reshape(count, self.length)

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t), exactly."""
        n, m, shown, rows = self.keys, self.values, self.pairs, np.arange(len(tokens_NT))
        reach = self.length if reach is None else reach
        keys_NR, values_NR = tokens_NT[:, ::2], tokens_NT[:, 1::2] - n
        nats_NT = np.full(tokens_NT.shape, math.inf)
        for i in range(shown + self.queries):
            # the key, at position 2 i: whole pairs from `first` on are within reach
            x_N, y_N, first = keys_NR[:, i], values_NR[:, i], max(0, i - reach // 2)
            there_NV, value_NV = self._in_reach(keys_NR, values_NR, first, i)
            known_N, d_N = there_NV[rows, x_N], there_NV.sum(1)
            is_key_N, is_value_N = x_N < n, (y_N >= 0) & (y_N < m)
            if i < shown:
                cost_N = np.where(known_N, math.inf, np.log(np.maximum(n - d_N, 1)))
            else:
                with np.errstate(divide="ignore"):
                    other_N = np.log(np.maximum(n - d_N, 1)) + math.log(shown) - np.log(np.maximum(shown - d_N, 0))
                cost_N = np.where(known_N, math.log(shown), other_N)
            nats_NT[:, 2 * i] = np.where(is_key_N, cost_N, math.inf)
            # its value, at position 2 i + 1
            if i < shown or reach == 0:
                nats_NT[:, 2 * i + 1] = np.where(is_value_N, math.log(m), math.inf)
                continue
            first = max(0, i - (reach - 1) // 2)
            there_NV, value_NV = self._in_reach(keys_NR, values_NR, first, i)
            known_N = there_NV[rows, x_N]
            if reach % 2 == 0 and first > 0:  # the value at first - 1 is within reach, its key is not
                stray_value_N, s = values_NR[:, first - 1], max(0, shown - first)
                shown_NV, _ = self._in_reach(keys_NR, values_NR, first, max(first, min(i, shown)))
                asked_NV = there_NV & ~shown_NV
                c_N = (asked_NV & (value_NV == stray_value_N[:, None])).sum(1)
                weight_N = 1 / np.maximum(m * c_N + shown - s - asked_NV.sum(1), 1)
                stray_N = (1 - weight_N) / m + weight_N * (y_N == stray_value_N)
            else:
                stray_N = np.full(len(rows), 1 / m)
            with np.errstate(divide="ignore"):
                p_N = np.where(known_N, value_NV[rows, x_N] == y_N, stray_N)
                nats_NT[:, 2 * i + 1] = np.where(is_value_N, -np.log(p_N), math.inf)
        return nats_NT

    def _in_reach(
        self, keys_NR: Int[np.ndarray, "N R"], values_NR: Int[np.ndarray, "N R"], first: int, end: int
    ) -> tuple[Bool[np.ndarray, "N V"], Int[np.ndarray, "N V"]]:
        """Which keys are in the pairs from ``first`` to before ``end``, and their values."""
        rows = np.arange(len(keys_NR))
        there_NV = np.zeros((len(rows), self.vocabulary), bool)
        value_NV = np.full((len(rows), self.vocabulary), -1)
        for pair in range(first, end):
            there_NV[rows, keys_NR[:, pair]] = True
            value_NV[rows, keys_NR[:, pair]] = values_NR[:, pair]
        return there_NV, value_NV
