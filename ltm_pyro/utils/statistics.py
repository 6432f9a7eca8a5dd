"""Means and ratios with their standard errors, over independent examples or over clusters of dependent ones.

Shapes: N examples, G clusters, any further axes.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Values = Tensor | np.ndarray
LEVEL = 0.95  # of every interval


class Estimate(NamedTuple):
    """A mean or a ratio, its standard error, its 95 % interval, and the p-value of "it is 0" (two-sided).

    Floats, or arrays of numpy if there are further axes; all but the value are NaN if everything is one cluster.
    """

    value: Any
    stderr: Any
    interval: tuple[Any, Any]
    p_value: Any


def standard_error(values: Values, axis: int = 0) -> Any:
    r"""The standard error of the mean of N independent values, such as draws, with Bessel's correction.

    .. math:: \mathrm{se}(\bar x) = \sqrt{\frac{1}{N (N - 1)} \sum_{n=1}^N (x_n - \bar x)^2}

    Args:
        values: numbers or truth values; with further axes, every series has a standard error of its own.
        axis: that of the N values.

    Returns:
        Of the same library as the values, in their shape without ``axis`` and in their unit; NaN if N is 1.
    """
    if values.shape[axis] < 2:  # torch and numpy would give NaN as well, with a warning
        return values.sum(axis) * math.nan
    sd = values.std(axis, correction=1) if isinstance(values, Tensor) else values.std(axis, ddof=1)
    return sd / math.sqrt(values.shape[axis])


def clustered_mean(values: Values, clusters: Values | None = None) -> Estimate:
    """`clustered_ratio` with denominators of 1: the mean over N examples."""
    return clustered_ratio(values, np.ones(len(values)), clusters)


def clustered_ratio(numerators: Values, denominators: Values, clusters: Values | None = None) -> Estimate:
    r"""A ratio of two sums, such as nats per token of sequences that differ in length, with the error of a jackknife.

    .. math:: R = \frac{\sum_g a_g}{\sum_g b_g}, \qquad
        \mathrm{se}(R)^2 = \frac{G - 1}{G} \sum_{g=1}^G (R_{(g)} - R)^2, \qquad R \pm t_\nu \, \mathrm{se}(R)

    a_g and b_g are the sums over cluster g, and R_(g) is the ratio without it. Student's t has ν = G_eff − 1 degrees of
    freedom, at least 1, with G_eff = (Σ b_g)² / Σ b_g², which is G for clusters of equal size. For equal denominators
    the standard error is that of the mean over clusters.

    Args:
        numerators: (N, …); with further axes, every ratio has an error of its own. To compare two models on the same
            examples, give their differences.
        denominators: (N,), not negative; a cluster of zeros in both, such as an empty completion, does not count.
        clusters: (N,), equal for examples that depend on each other, such as the pieces of one document; by default
            every example is a cluster.

    Source: Cameron & Miller (2015), A Practitioner's Guide to Cluster-Robust Inference, section VI; Kish (1965) for the
    effective number of clusters.
    """
    a_N, b_N = (np.asarray(x.cpu() if isinstance(x, Tensor) else x, float) for x in (numerators, denominators))
    if not len(b_N):  # such as the gains of texts of which none has a second block
        nothing = _plain(np.full(a_N.shape[1:], math.nan))
        return Estimate(nothing, nothing, (nothing, nothing), nothing)
    if clusters is not None:
        _, index_N = np.unique(np.asarray(clusters), return_inverse=True)
        a_N, b_N = (_sums(x, index_N) for x in (a_N, b_N))
    counts_N = (b_N != 0) | (a_N.reshape(len(a_N), -1) != 0).any(1)
    a_N, b_N = a_N[counts_N], b_N[counts_N]
    groups, total = len(b_N), b_N.sum()
    value = a_N.sum(0) / total if total else a_N.sum(0) * math.nan
    if groups < 2 or (b_N != 0).sum() < 2:  # without one of them there is no ratio
        nothing = value * math.nan
        return Estimate(_plain(value), _plain(nothing), (_plain(nothing), _plain(nothing)), _plain(nothing))
    from scipy.special import stdtr, stdtrit  # here, because it takes a tenth of a second to import

    rest_N = (total - b_N).reshape(-1, *[1] * (a_N.ndim - 1))
    with np.errstate(invalid="ignore"):  # of an infinite value the error is NaN
        without_N = (a_N.sum(0) - a_N) / rest_N
        stderr = np.sqrt((groups - 1) / groups * ((without_N - value) ** 2).sum(0))
    freedom = max(total**2 / (b_N**2).sum() - 1, 1.0)
    half = stdtrit(freedom, (1 + LEVEL) / 2) * stderr
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = np.where(value == 0, 1.0, 2 * stdtr(freedom, -np.abs(value / stderr)))
    return Estimate(_plain(value), _plain(stderr), (_plain(value - half), _plain(value + half)), _plain(p_value))


def _sums(values_N: np.ndarray, index_N: np.ndarray) -> np.ndarray:
    sums = np.zeros((index_N.max() + 1, *values_N.shape[1:]))
    np.add.at(sums, index_N, values_N)
    return sums


def _plain(x: Any) -> Any:
    return x if np.ndim(x) else float(x)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion of n (Wilson 1927); its width is above 0 also for a share of 0 or 1."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def mcnemar(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """The two-sided p-value that two ways to answer N questions are right as often (McNemar's test, exact).

    It is that of a binomial test of the questions in which they differ.
    """
    from scipy.stats import binomtest

    differ = int((first_N != second_N).sum())
    return float(binomtest(int((first_N & ~second_N).sum()), differ).pvalue) if differ else 1.0
