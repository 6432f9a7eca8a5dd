"""A kernel two-sample test: do two sets of draws have the same distribution?

Shapes: N draws, D coordinates.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

PERMUTATIONS = 99


class Discrepancy(NamedTuple):
    """The squared maximum mean discrepancy, and its p-value from random splits of the pooled draws."""

    mmd2: float
    p_value: float


def mmd(a_ND: Float[np.ndarray, "n D"], b_ND: Float[np.ndarray, "m D"], seed: int = 0) -> Discrepancy:
    r"""The unbiased MMD² with a Gaussian kernel whose bandwidth is the median distance (Gretton et al. 2012).

    .. math:: E\,k(a, a') + E\,k(b, b') - 2 E\,k(a, b)
    """
    x_ND, size = np.concatenate([a_ND, b_ND]).astype(float), len(a_ND)
    square_N = (x_ND**2).sum(1)
    distance_NN = np.maximum(square_N[:, None] + square_N - 2 * x_ND @ x_ND.T, 0)
    kernel_NN = np.exp(-distance_NN / np.median(distance_NN[distance_NN > 0]))
    np.fill_diagonal(kernel_NN, 0)
    found, random = _mmd2(kernel_NN, np.arange(len(x_ND)), size), np.random.default_rng(seed)
    larger = sum(_mmd2(kernel_NN, random.permutation(len(x_ND)), size) >= found for _ in range(PERMUTATIONS))
    return Discrepancy(found, (1 + larger) / (1 + PERMUTATIONS))


def _mmd2(kernel_NN: Float[np.ndarray, "N N"], order: np.ndarray, size: int) -> float:
    sign_N = np.empty(len(order))
    first, second = order[:size], order[size:]
    other = len(second)
    sign_N[first], sign_N[second] = 1.0, 0.0
    within_N = kernel_NN @ sign_N
    aa, ab = within_N[first].sum(), within_N[second].sum()
    bb = kernel_NN.sum() - aa - 2 * ab
    return float(aa / (size * (size - 1)) + bb / (other * (other - 1)) - 2 * ab / (size * other))
