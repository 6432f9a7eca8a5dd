"""Standard errors of a mean and of a ratio, over independent examples (sequences, passages, texts).

Shapes: N examples, any further axes.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = Tensor | np.ndarray


def standard_error(values: Values, axis: int = 0) -> Any:
    r"""The standard error of the mean of N independent values, with Bessel's correction.

    .. math:: \mathrm{se}(\bar x) = \sqrt{\frac{1}{N (N - 1)} \sum_{n=1}^N (x_n - \bar x)^2}

    Args:
        values: numbers or truth values; with further axes, every series has a standard error of its own.
        axis: that of the N examples.

    Returns:
        Of the same library as the values, in their shape without ``axis`` and in their unit; NaN if N is 1.
    """
    return _standard_deviation(values, axis) / math.sqrt(values.shape[axis])


def ratio_standard_error(numerators: Values, denominators: Values, clusters: Values | None = None) -> Any:
    r"""The standard error of a ratio of two sums over N independent examples, by linearisation.

    .. math:: R = \frac{\sum_n a_n}{\sum_n b_n}, \qquad
        \mathrm{se}(R) = \frac{\sqrt N}{\sum_n b_n} \sqrt{\frac{1}{N - 1} \sum_{n=1}^N (a_n - R\, b_n)^2}

    Such as nats per token of sequences that differ in length, or the share of tokens that are right.

    Args:
        numerators: a, (N, …); with further axes, every ratio has a standard error of its own.
        denominators: b, (N,), above 0.
        clusters: (N,), the same number for examples that are not independent of each other, such as the pieces of one
            document: their numerators and denominators are summed first, and N counts the clusters.

    Returns:
        Of the same library, in the shape of one numerator and in the ratio's unit; NaN if N is 1. Source: Cochran,
        Sampling Techniques (1977), section 2.11.
    """
    if clusters is not None:
        numerators, denominators = (_sums(x, clusters) for x in (numerators, denominators))
    total = denominators.sum()
    ratio = numerators.sum(0) / total
    residuals = numerators - ratio * denominators.reshape(-1, *[1] * (numerators.ndim - 1))
    return _standard_deviation(residuals, 0) * math.sqrt(len(numerators)) / total


def t_interval(value: float, stderr: float, examples: int, level: float = 0.95) -> tuple[float, float]:
    r"""The interval of a mean or a ratio over N independent examples (or clusters), by Student's t with N − 1 degrees.

    .. math:: R \pm t_{N - 1, (1 + \mathrm{level}) / 2} \; \mathrm{se}(R)

    With few examples it is wider than the normal's: 1.4 times at N = 5. NaN if N is 1.
    """
    if examples < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit  # here, because it takes a tenth of a second to import

    half = float(stdtrit(examples - 1, (1 + level) / 2)) * stderr
    return value - half, value + half


def _sums(values: Values, clusters: Values) -> Any:
    """The sums of the values of each cluster."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if isinstance(values, np.ndarray):
        sums = np.zeros((index.max() + 1, *values.shape[1:]), np.result_type(values, np.float64))
        np.add.at(sums, index, values)
        return sums
    return values.new_zeros(index.max() + 1, *values.shape[1:]).index_add(0, torch.from_numpy(index), values)


def _standard_deviation(values: Values, axis: int) -> Any:
    if values.shape[axis] < 2:  # torch and numpy would give NaN as well, with a warning
        return values.sum(axis) * math.nan
    return values.std(axis, correction=1) if isinstance(values, Tensor) else values.std(axis, ddof=1)
