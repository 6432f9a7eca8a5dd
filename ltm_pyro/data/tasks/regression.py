"""The task `regression`: a line to be learned from noisy points."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from ltm_pyro.data.tasks.task import Task, check_options, register_task
from ltm_pyro.errors import UsageError

_MOST_NODES = 256  # per axis
_ROWS = 64


@register_task("regression")
@dataclass
class Regression(Task):
    """[x₁] [y₁] [x₂] [y₂] …: y = a x + b + σ ε, ε ~ N(0, 1), with a, b ~ uniform(−1, 1) new in each sequence.

    x is uniform over the centres of m equal bins of [−1, 1]; [x] is the number of its bin. [y] is m plus the number of
    its bin out of k equal ones of [−2, 2], of which the outer two are open. With
    ℓ([x], [y]; a, b) = Φ((upper − a x − b) / σ) − Φ((lower − a x − b) / σ),
    p([y_i] | before) = ∫ ℓ_i Π_{j<i} ℓ_j da db / ∫ Π_{j<i} ℓ_j da db over the points in reach, by Gauss–Legendre
    quadrature with π √pairs / (1.25 σ) nodes for each of a and b: twice as many change the nats of a sequence by less
    than 0.0001. A [y] whose [x] is just out of reach counts with ℓ averaged over x.

    Args:
        x_bins: m, bins of x
        y_bins: k, bins of y
        pairs: points of a sequence
        noise: σ, standard deviation of the noise
    """

    x_bins: int = 16
    y_bins: int = 16
    pairs: int = 16
    noise: float = 0.25

    def __post_init__(self) -> None:
        check_options("regression", x_bins=(self.x_bins, 1, 10_000), y_bins=(self.y_bins, 2, 10_000))
        check_options("regression", pairs=(self.pairs, 1, 10_000), noise=(self.noise, 1e-3, 1e3))
        if self._nodes > _MOST_NODES:
            raise UsageError(f"{self.pairs} pairs with noise {self.noise} are too sharp to integrate: raise --noise.")
        if (size := self.x_bins * self.y_bins * self._nodes**2) > 2**27:
            raise UsageError(f"The integral would need a table of {size:,} numbers: lower --x-bins or --y-bins.")
        self.vocabulary, self.length = self.x_bins + self.y_bins, 2 * self.pairs

    @property
    def _nodes(self) -> int:
        return max(8, math.ceil(math.pi * math.sqrt(self.pairs) / (1.25 * self.noise)))

    @cached_property
    def _likelihoods_XYG(self) -> Float[np.ndarray, "X Y G"]:
        """ℓ of every pair of bins at all nodes (a, b)."""
        from scipy.special import ndtr

        nodes, _ = np.polynomial.legendre.leggauss(self._nodes)
        line_XG = self._centres_X[:, None] * np.repeat(nodes, self._nodes) + np.tile(nodes, self._nodes)
        below_XYG = ndtr((self._edges_Y[:, None] - line_XG[:, None]) / self.noise)
        below_XYG = np.concatenate([np.zeros_like(below_XYG[:, :1]), below_XYG, np.ones_like(below_XYG[:, :1])], 1)
        return np.maximum(np.diff(below_XYG, axis=1), 1e-30)

    @property
    def _centres_X(self) -> Float[np.ndarray, " X"]:
        return (2 * np.arange(self.x_bins) + 1) / self.x_bins - 1

    @property
    def _edges_Y(self) -> Float[np.ndarray, " Y"]:
        """Between the bins of y."""
        return np.linspace(-2, 2, self.y_bins + 1)[1:-1]

    def sample(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, "N T"]:
        """``count`` independent sequences."""
        a_N1, b_N1 = rng.uniform(-1, 1, (2, count, 1))
        x_NP = rng.integers(0, self.x_bins, (count, self.pairs))
        y_NP = a_N1 * self._centres_X[x_NP] + b_N1 + self.noise * rng.standard_normal(x_NP.shape)
        return np.stack([x_NP, self.x_bins + np.digitize(y_NP, self._edges_Y)], 2).reshape(count, self.length)

    def nats(self, tokens_NT: Int[np.ndarray, "N T"], reach: int | None = None) -> Float[np.ndarray, "N T"]:
        """−log p(x_t | x_{t−r} … x_{t−1}, t), by quadrature."""
        is_x_NT, m = tokens_NT < self.x_bins, self.x_bins
        as_expected_NT = is_x_NT == (np.arange(self.length) % 2 == 0)
        x_NP, y_NP = np.where(is_x_NT, tokens_NT, 0)[:, ::2], np.where(is_x_NT, m, tokens_NT)[:, 1::2] - m
        nats_NT = np.full(tokens_NT.shape, math.log(m))
        _, weights = np.polynomial.legendre.leggauss(self._nodes)
        prior_G, reach = np.outer(weights, weights).ravel() / 4, self.length if reach is None else reach
        for n in range(0, len(x_NP), _ROWS):  # the products of so many stay in the processor's cache
            rows = slice(n, n + _ROWS)
            nats_NT[rows, 1::2] = self._nats_of_y(x_NP[rows], y_NP[rows], reach, prior_G)
        return np.where(as_expected_NT, nats_NT, math.inf)

    def _nats_of_y(
        self, x_NP: Int[np.ndarray, "N P"], y_NP: Int[np.ndarray, "N P"], reach: int, prior_G: Float[np.ndarray, " G"]
    ) -> Float[np.ndarray, "N P"]:
        points_XYG, nats_NP = self._likelihoods_XYG, np.empty(x_NP.shape)
        no_x_YG = points_XYG.mean(0)
        if reach == 0:
            return -np.log(no_x_YG @ prior_G)[y_NP]
        posterior_NG = np.tile(prior_G, (len(x_NP), 1))
        for i in range(self.pairs):
            first = max(0, i - (reach - 1) // 2)
            if first > 0:
                posterior_NG[:] = prior_G if reach % 2 else prior_G * no_x_YG[y_NP[:, first - 1]]
                for j in range(first, i):
                    posterior_NG *= points_XYG[x_NP[:, j], y_NP[:, j]]
            before_N = posterior_NG.sum(1)
            now_NG = posterior_NG * points_XYG[x_NP[:, i], y_NP[:, i]]
            now_N = now_NG.sum(1)
            nats_NP[:, i] = np.log(before_N) - np.log(now_N)
            posterior_NG = now_NG / now_N[:, None]
        return nats_NP
