"""Plots of Markov chains: the trace of one coordinate, and its ranks."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from scipy.stats import rankdata

from ltm_pyro.utils.plotting import axes_of, plain

BINS = 20


def plot_trace(one: xr.DataArray, name: str, ax: Axes | None = None) -> Axes:
    """The draws of one coordinate (chain, draw), a line a chain: they should overlap and not drift."""
    ax = axes_of(ax)
    for values in one.transpose("chain", "draw").values:
        ax.plot(values, linewidth=0.6, alpha=0.8)
    return plain(ax, title=f"Trace, {name}", xlabel="draw", ylabel="z")


def plot_chain_ranks(one: xr.DataArray, name: str, ax: Axes | None = None) -> Axes:
    """The ranks of each chain's draws among those of all chains; flat if the chains agree (Vehtari et al. 2021)."""
    ax = axes_of(ax)
    values = one.transpose("chain", "draw").values
    ranks = rankdata(values).reshape(values.shape) / values.size
    for chain in ranks:
        counts, edges = np.histogram(chain, BINS, (0, 1))
        ax.stairs(counts * BINS / len(chain), edges)
    ax.axhline(1, color="grey", linestyle="--", linewidth=1)
    return plain(ax, title=f"Ranks of the chains, {name}", xlabel="rank / draws", ylabel="density", xlim=(0, 1))
