"""Plots of a calibration: rank histogram, ECDF with its envelope, coverage."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.analysis.calibration import BINS, LOG_LIKELIHOOD, Calibration, envelope
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, axes_of, plain


def plot_calibration(found: Calibration) -> Figure:
    """All three plots side by side."""
    picture = Figure(figsize=(12, 3.4), layout="constrained")
    for plot, ax in zip((plot_ranks, plot_ecdf, plot_coverage), picture.subplots(1, 3), strict=True):
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
    """The coverage of central intervals: on the diagonal if q is the posterior, below it if q is too narrow."""
    ax = axes_of(ax)
    levels = np.linspace(0.05, 0.95, 19)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    ax.plot(found.attainable(levels), found.coverage(levels), color=BLUE, marker="o", markersize=3)
    return plain(ax, title="Coverage", xlabel="probability of the interval", ylabel="share that contains the truth")
