"""The task `markov`: a Markov chain whose transition matrix is to be learned, a new one in every sequence."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task
from ltm_pyro.errors import UsageError

_STEPS = 12  # tokens before a window, beyond which the chain counts as stationary
_PATTERNS = 5_000  # windows that differ in more than the names of their symbols
_SUBSETS = (1, 1, 2, 5, 15, 52, 203, 877, 4_140, 21_147)  # Bell's numbers: patterns of so many tokens


@register_task("markov")
@dataclass
class Markov(Task):
    """x_t ~ P[x_{t−1}, ·], x₁ uniform over V symbols; every row of P ~ Dirichlet(α, …, α), new in each sequence.

    With n_ab transitions from a to b before t, p(x_t = b | x_{t−1} = a) = (α + n_ab) / (V α + Σ_b n_ab), Pólya's urn.
    Within a reach of r tokens, where the window begins with the symbol w after s tokens:
    E[(u Pˢ)_w P_ab] / E[(u Pˢ)_w] with u uniform and P from its posterior given the window's transitions, for that a
    symbol is met in a window says that the chain is often there. That is Monte Carlo over at least 2,048 matrices for
    each pattern of the window, up to names of symbols; its noise makes it too large, with V = 6 by less than 0.02 nats
    in 64 tokens.

    Args:
        symbols: V, states of the chain
        tokens: T, tokens of a sequence
        alpha: concentration of the rows; the smaller, the more predictable a sequence
    """

    symbols: int = 6
    tokens: int = 64
    alpha: float = 0.3

    def __post_init__(self) -> None:
        check_options("markov", symbols=(self.symbols, 2, 64), tokens=(self.tokens, 1, 2**20))
        check_options("markov", alpha=(self.alpha, 1e-3, 1e6))
        self.vocabulary, self.length = self.symbols, self.tokens

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences, drawn from Pólya's urn: the same law, without the matrices."""
        rows, tokens_NT = np.arange(count), np.empty((count, self.tokens), np.int64)
        tokens_NT[:, 0] = rng.integers(0, self.symbols, count)
        weights_NVV = np.full((count, self.symbols, self.symbols), self.alpha)
        for t in range(1, self.tokens):
            sums_NV = weights_NVV[rows, tokens_NT[:, t - 1]].cumsum(1)
            found_N = (sums_NV < rng.random((count, 1)) * sums_NV[:, -1:]).sum(1)
            tokens_NT[:, t] = np.minimum(found_N, self.symbols - 1)
            weights_NVV[rows, tokens_NT[:, t - 1], tokens_NT[:, t]] += 1
        return tokens_NT

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t): exactly if ``reach`` is None or 0, else by Monte Carlo."""
        rows, nats_NT = np.arange(len(tokens_NT)), np.full(tokens_NT.shape, math.log(self.symbols))
        if reach == 0:
            return nats_NT  # the law knows no symbol from another
        weights_NVV = np.full((len(rows), self.symbols, self.symbols), self.alpha)
        for t in range(1, self.tokens if reach is None else min(self.tokens, reach + 1)):
            a_N, b_N = tokens_NT[:, t - 1], tokens_NT[:, t]
            row_NV = weights_NVV[rows, a_N]
            nats_NT[:, t] = np.log(row_NV.sum(1)) - np.log(row_NV[rows, b_N])
            weights_NVV[rows, a_N, b_N] += 1
        return nats_NT if reach is None else self._within(tokens_NT, nats_NT, reach)

    def _within(
        self, tokens_NT: Int[np.ndarray, "N T"], nats_NT: Float[np.ndarray, "N T"], reach: int
    ) -> Float[np.ndarray, "N T"]:
        """Fills in the tokens before which more than ``reach`` tokens lie."""
        if reach >= len(_SUBSETS) or _SUBSETS[reach] > _PATTERNS:
            raise UsageError(f"The best within a reach of {reach} tokens is not known for markov: ask for at most 8.")
        cache: dict[tuple[int, ...], np.ndarray] = self.__dict__.setdefault("_predictions", {})
        for t in range(reach, self.tokens):
            named_Nr = _by_appearance(tokens_NT[:, t - reach : t + 1])
            codes_N = named_Nr[:, :-1] @ (self.symbols ** np.arange(reach))
            _, first, which_N = np.unique(codes_N, return_index=True, return_inverse=True)
            patterns = [tuple(named_Nr[n, :-1].tolist()) for n in first]
            for pattern in patterns:
                if pattern not in cache:
                    cache[pattern] = self._predictions_of(pattern)
            before = min(t - reach, _STEPS)
            p_MV = np.stack([cache[pattern][before] for pattern in patterns])
            nats_NT[:, t] = -np.log(p_MV[which_N, named_Nr[:, -1]])
        return nats_NT

    def _predictions_of(self, pattern: tuple[int, ...]) -> Float[np.ndarray, "S V"]:
        """p(x_t | window, s) for s from 0 to `_STEPS` tokens before the window, symbols named by their appearance."""
        V, known = self.symbols, max(pattern) + 1
        shape_VV = np.full((V, V), self.alpha)
        np.add.at(shape_VV, (np.array(pattern[:-1], int), np.array(pattern[1:], int)), 1)
        rng = np.random.default_rng([len(pattern), *pattern])  # the same whatever else is asked for
        draws = max(2**11, min(2**15, 2**21 // max(_SUBSETS[len(pattern)], V**2)))
        P_DVV = np.maximum(rng.standard_gamma(shape_VV, (draws, V, V)), 1e-300)
        P_DVV /= P_DVV.sum(2, keepdims=True)
        at_DV, last = np.full((draws, V), 1 / V), pattern[-1]
        mean_V = shape_VV[last] / shape_VV[last].sum()
        p_SV = np.empty((_STEPS + 1, V))
        for s in range(_STEPS + 1):
            p_SV[s] = at_DV[:, pattern[0]] @ P_DVV[:, last] / at_DV[:, pattern[0]].sum()
            at_DV = np.einsum("dv,dvw->dw", at_DV, P_DVV)
        p_SV *= mean_V / p_SV[0]  # at s = 0 the answer is known, and the noise is much the same
        if known < V:  # symbols that are not in the window are alike
            p_SV[:, known:] = p_SV[:, known:].mean(1, keepdims=True)
        return p_SV / p_SV.sum(1, keepdims=True)


def _by_appearance(tokens_Nr: Int[np.ndarray, "N r"]) -> Int[np.ndarray, "N r"]:
    """Symbols renamed 0, 1, … in the order in which each sequence first has them."""
    named_Nr = np.zeros_like(tokens_Nr)
    count_N = np.ones(len(tokens_Nr), np.int64)
    for i in range(1, tokens_Nr.shape[1]):
        same_Ni = tokens_Nr[:, :i] == tokens_Nr[:, i : i + 1]
        found_N = same_Ni.any(1)
        named_Nr[:, i] = np.where(found_N, named_Nr[np.arange(len(named_Nr)), same_Ni.argmax(1)], count_N)
        count_N += ~found_N
    return named_Nr
