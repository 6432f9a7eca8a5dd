"""Pictures of a calibration: rank histogram, ECDF within its envelope, coverage."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.analysis.calibration import BINS, LOG_LIKELIHOOD, Calibration, envelope
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, axes_of, plain


def figure(found: Calibration) -> Figure:
    """All three side by side."""
    picture = Figure(figsize=(12, 3.4), layout="constrained")
    for draw, ax in zip((draw_ranks, draw_ecdf, draw_coverage), picture.subplots(1, 3), strict=True):
        draw(found, ax=ax)
    return picture


def draw_ranks(found: Calibration, ax: Axes | None = None) -> Axes:
    """Where the truth ranks among the draws, all coordinates of z together.

    Flat if q is the posterior; a U if it is too narrow, a hill if too wide, a slope if off centre.
    """
    ax = axes_of(ax)
    counts = found.counts[:, :-1].sum(1)
    share = counts / counts.sum()
    ax.bar((np.arange(BINS) + 0.5) / BINS, share * BINS, width=0.92 / BINS, color=BLUE)
    ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
    return plain(ax, title="Ranks of the truth", xlabel="rank / (S + 1)", ylabel="density", xlim=(0, 1))


def draw_ecdf(found: Calibration, ax: Axes | None = None) -> Axes:
    """Every coordinate's ECDF of ranks, less the diagonal, with the band that 95 % of exact posteriors stay within."""
    ax = axes_of(ax)
    simulations, candidates, _ = found.values.shape
    points = np.arange(1, candidates) / candidates  # between ranks: elsewhere their ECDF is not the diagonal's
    low, high = envelope(simulations, points)
    position = (found.ranks + 0.5) / candidates
    ecdf = (position[:, None] <= points[:, None]).mean(0) - points[:, None]
    ax.plot(points, ecdf[:, :-1], color=BLUE, alpha=0.25, linewidth=0.7)
    ax.plot(points, ecdf[:, -1], color=ORANGE, linewidth=1.6, label=LOG_LIKELIHOOD)
    ax.fill_between(points, low - points, high - points, color=GREY, alpha=0.3, linewidth=0, label="95 % envelope")
    ax.plot([], [], color=BLUE, label="coordinates of z")
    ax.legend(fontsize=8, frameon=False, loc="lower left")  # finding the best place takes long
    return plain(
        ax, title="ECDF of ranks, less the diagonal", xlabel="rank / (S + 1)", ylabel="difference", xlim=(0, 1)
    )


def draw_coverage(found: Calibration, ax: Axes | None = None) -> Axes:
    """How often central intervals hold the truth: on the diagonal if q is the posterior, below it if too narrow."""
    ax = axes_of(ax)
    levels = np.linspace(0.05, 0.95, 19)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    ax.plot(found.attainable(levels), found.coverage(levels), color=BLUE, marker="o", markersize=3)
    return plain(ax, title="Coverage", xlabel="probability of the interval", ylabel="share that holds the truth")
