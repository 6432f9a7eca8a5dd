"""Plots of a calibration: rank histogram, ECDF and coverage with their envelopes, TARP, contraction."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.analysis.calibration import BINS, LOG_LIKELIHOOD, Calibration, envelope
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, axes_of, plain


def plot_calibration(found: Calibration) -> Figure:
    """All five plots side by side."""
    picture = Figure(figsize=(20, 3.4), layout="constrained")
    plots = (plot_ranks, plot_ecdf, plot_coverage, plot_tarp, plot_contraction)
    for plot, ax in zip(plots, picture.subplots(1, len(plots)), strict=True):
        plot(found, ax=ax)
    return picture


def plot_ranks(found: Calibration, ax: Axes | None = None) -> Axes:
    """The rank histogram of the truth among the draws, all coordinates of z together.

    Flat if q is the posterior, U-shaped if q is too narrow, hill-shaped if too wide, sloped if its mean is biased.
    """
    ax = axes_of(ax)
    counts = found.counts[:, :-1].sum(1)
    share = counts / counts.sum()
    ax.bar((np.arange(BINS) + 0.5) / BINS, share * BINS, width=0.92 / BINS, color=BLUE)
    ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
    return plain(ax, title="Ranks of the truth", xlabel="rank / (S + 1)", ylabel="density", xlim=(0, 1))


def plot_ecdf(found: Calibration, ax: Axes | None = None) -> Axes:
    """The ECDF of each coordinate's ranks minus the diagonal, with the 95 % envelope of an exact posterior."""
    ax = axes_of(ax)
    simulations, candidates, _ = found.values.shape
    points = np.arange(1, candidates) / candidates  # between ranks: only there the diagonal is exact
    low, high = envelope(simulations, points)
    position = (found.ranks + 0.5) / candidates
    ecdf = (position[:, None] <= points[:, None]).mean(0) - points[:, None]
    ax.plot(points, ecdf[:, :-1], color=BLUE, alpha=0.25, linewidth=0.7)
    ax.plot(points, ecdf[:, -1], color=ORANGE, linewidth=1.6, label=LOG_LIKELIHOOD)
    ax.fill_between(points, low - points, high - points, color=GREY, alpha=0.3, linewidth=0, label="95 % envelope")
    ax.plot([], [], color=BLUE, label="coordinates of z")
    ax.legend(fontsize=8, frameon=False, loc="lower left")  # because loc="best" is slow
    return plain(
        ax, title="ECDF of ranks minus the diagonal", xlabel="rank / (S + 1)", ylabel="difference", xlim=(0, 1)
    )


def plot_coverage(found: Calibration, ax: Axes | None = None) -> Axes:
    """The coverage of central intervals minus their probability: 0 if q is the posterior, below it if q is too narrow.

    A line for each coordinate, with the band that an exact posterior's line stays in, at all levels, in 95 % of cases.
    """
    ax = axes_of(ax)
    levels = np.linspace(0.05, 0.95, 19)
    expected = found.attainable(levels)
    low, high = envelope(len(found.values), expected)
    by_coordinate = found.coverage_by_coordinate(levels) - expected[:, None]
    ax.fill_between(levels, low - expected, high - expected, color=GREY, alpha=0.3, linewidth=0, label="95 % envelope")
    ax.plot(levels, by_coordinate[:, :-1], color=BLUE, alpha=0.25, linewidth=0.7)
    ax.plot(levels, found.coverage(levels) - expected, color=BLUE, marker="o", markersize=3, label="all coordinates")
    ax.plot(levels, by_coordinate[:, -1], color=ORANGE, linewidth=1.6, label=LOG_LIKELIHOOD)
    ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return plain(ax, title="Coverage", xlabel="probability of the interval", ylabel="truths inside, too many")


def plot_tarp(found: Calibration, ax: Axes | None = None) -> Axes:
    """The ECDF of `Calibration.tarp` minus the diagonal, with its 95 % envelope."""
    ax = axes_of(ax)
    points = np.arange(1, found.values.shape[1]) / found.values.shape[1]
    low, high = envelope(len(found.values), points)
    ecdf = (found.tarp()[:, None] <= points).mean(0)
    ax.fill_between(points, low - points, high - points, color=GREY, alpha=0.3, linewidth=0, label="95 % envelope")
    ax.plot(points, ecdf - points, color=BLUE, label="all coordinates")
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return plain(ax, title="TARP", xlabel="credibility", ylabel="expected coverage minus it", xlim=(0, 1))


def plot_contraction(found: Calibration, ax: Axes | None = None) -> Axes:
    """z-score against contraction of every coordinate in every simulation: right and near 0 is a good q."""
    ax = axes_of(ax)
    contraction, z = found.contraction()
    ax.scatter(contraction, z, s=3, color=BLUE, alpha=0.15, linewidth=0)
    for limit in (-3, 3):
        ax.axhline(limit, color=GREY, linestyle="--", linewidth=1)
    return plain(
        ax, title="z-score and contraction", xlabel="contraction (0: the prior)", ylabel="z-score of the truth"
    )
