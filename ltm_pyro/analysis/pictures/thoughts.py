"""Plots of a posterior: k-hat, bounds, figures by thought, means in two dimensions, attention and others.

Shapes: N sequences, L layers, K thoughts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from ltm_pyro.analysis.global_posterior import GlobalPosterior
from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.stability import Agreement
from ltm_pyro.data.documents import Label
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.plotting import BLUE, CYCLE, GREY, MARKERS, ORANGE, RED, axes_of, plain


def plot_pareto_k(posterior: Posterior, ax: Axes | None = None) -> Axes:
    """The sorted k-hat of all sequences, with the largest trusted value."""
    ax = axes_of(ax)
    k_N = np.sort(posterior.stats["pareto_k"].values.clip(-0.5, 3))
    ax.scatter(np.arange(len(k_N)), k_N, s=9, c=[RED if k > TRUSTED else BLUE for k in k_N])
    ax.axhline(TRUSTED, color=GREY, linestyle="--", linewidth=1)
    ax.text(0, TRUSTED, f" trusted below {TRUSTED}", va="bottom", fontsize=8, color=GREY)
    return plain(ax, title="Pareto k-hat", xlabel="sequences, sorted", ylabel="k-hat")


def plot_bounds(posterior: Posterior, ax: Axes | None = None) -> Axes:
    """A histogram of importance-weighted bound minus ELBO, which is 0 for every sequence if q is the posterior."""
    ax = axes_of(ax)
    gap_N = (posterior.stats["iwae"] - posterior.stats["elbo"]).values
    low, high = float(gap_N.min()), float(gap_N.max())
    if high - low < 1e-4 * max(1.0, abs(high)):  # as good as equal, which numpy cannot cut into bins
        low, high = low - 1e-3 * max(1.0, abs(low)), high + 1e-3 * max(1.0, abs(high))
    ax.hist(gap_N, bins=min(30, max(5, len(gap_N) // 5)), range=(low, high), color=BLUE)
    return plain(ax, title="Importance-weighted bound minus ELBO", xlabel="nats per sequence", ylabel="sequences")


def plot_by_thought(by_thought: xr.DataArray, title: str, unit: str, ax: Axes | None = None) -> Axes:
    """One number per thought, as a heat map of layers and thoughts."""
    ax = axes_of(ax)
    values_LK = by_thought.transpose("layer", "thought").values
    image = ax.imshow(values_LK, cmap="cividis", aspect="auto", vmin=min(0, values_LK.min()))
    ax.figure.colorbar(image, ax=ax, label=unit)
    middle = (values_LK.max() + min(0, values_LK.min())) / 2
    if values_LK.size <= 64:
        for (layer, thought), value in np.ndenumerate(values_LK):
            colour = "white" if value < middle else "black"
            ax.text(thought, layer, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    plain(ax, title=title, xlabel="thought", ylabel="layer")
    for axis, size in zip((ax.yaxis, ax.xaxis), values_LK.shape, strict=True):
        axis.set_ticks(range(size), [str(number) for number in range(1, size + 1)])
    return ax


def plot_map(posterior: Posterior, label: str | None = None, ax: Axes | None = None) -> Axes:
    """The means of q on their first two principal components, coloured by the most frequent classes of a label."""
    ax = axes_of(ax)
    plane, (first, second) = principal_plane(posterior)
    values, names = classes_of(posterior.labels[label] if label else [None] * posterior.size)
    for colour, marker, name in zip(CYCLE, MARKERS, names, strict=False):
        x, y = plane[values == name].T
        ax.scatter(x, y, s=12, marker=marker, color=colour, label=name or None, alpha=0.8, linewidth=0)
    if label:
        outside: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        ax.legend(fontsize=8, frameon=False, title=label, title_fontsize=8, **outside)
    return plain(ax, title="Means of q", xlabel=f"PC 1 ({first:.0%} of the variance)", ylabel=f"PC 2 ({second:.0%})")


def principal_plane(posterior: Posterior) -> tuple[np.ndarray, tuple[float, float]]:
    """The means of q on their first two principal components, (N, 2), and each component's share of the variance."""
    means_ND = posterior.stats["mean"].values.reshape(posterior.size, -1)
    left, scale, _ = np.linalg.svd(means_ND - means_ND.mean(0), full_matrices=False)
    plane = np.zeros((posterior.size, 2))  # a single coordinate or sequence has only one component
    plane[:, : len(scale)] = left[:, :2] * scale[:2]
    first, second = (plane**2).sum(0) / ((scale**2).sum() or 1.0)
    return plane, (float(first), float(second))


def plot_fast_steps(posterior: Posterior, still: Sequence[int] | np.ndarray = (), ax: Axes | None = None) -> Axes:
    """The ELBO before each fast step less its last value, a line a sequence; those still climbing in red."""
    ax = axes_of(ax)
    elbo_NB = posterior.stats["elbo_by_step"].transpose("step", "sequence").values
    below_NB = elbo_NB - elbo_NB[-max(1, len(elbo_NB) // 4) :].mean(0)
    for number, line_N in enumerate(below_NB.T[:200]):
        is_climbing = number in still
        ax.plot(line_N, color=RED if is_climbing else BLUE, alpha=0.7 if is_climbing else 0.15, linewidth=0.8)
    ax.plot(np.nanmedian(below_NB, 1), color=ORANGE, linewidth=2, label="median", zorder=4)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    low = min(float(np.nanquantile(below_NB, 0.02)), -1.0)
    label = "ELBO below its end (nats)"
    return plain(ax, title="ELBO over the fast steps", xlabel="fast step", ylabel=label, ylim=(1.1 * low, -0.2 * low))


def plot_agreement(found: Agreement, ax: Axes | None = None) -> Axes:
    """R² of permuted documents as a histogram, and that of the documents as a line: far to the right is agreement."""
    ax = axes_of(ax)
    ax.hist(found.null, bins=20, color=GREY, label="permuted documents")
    ax.axvline(found.r2, color=BLUE, linewidth=2, label="the documents")
    ax.legend(fontsize=8, frameon=False)
    return plain(ax, title="Agreement of two models", xlabel="R² after rotation, held out", ylabel="permutations")


def plot_global(found: GlobalPosterior, ax: Axes | None = None) -> Axes:
    """Median and 90 % interval of each component of a global latent variable, sorted, and the prior's median."""
    ax = axes_of(ax)
    low, median, high = found.interval_3N
    order = median.argsort()
    place = np.arange(len(order))
    ax.vlines(place, low[order], high[order], color=BLUE, alpha=0.4, linewidth=1)
    ax.scatter(place, median[order], s=6, color=BLUE)
    ax.axhline(float(np.median(found.prior_SN)), color=GREY, linestyle="--", linewidth=1, label="prior median")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    return plain(ax, title=f"Global latent '{found.name}'", xlabel="components, sorted", ylabel="90 % interval of q")


def classes_of(labels: Sequence[Label]) -> tuple[np.ndarray, list[str]]:
    """The class of every sequence as a string, and all classes, no more than there are colours.

    The rarest are joined if there are more; a missing label is an empty string.
    """
    values = ["" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for x in labels]
    counts = [name for name, _ in Counter(values).most_common()]
    if len(counts) <= len(CYCLE):
        return np.array(values), sorted(counts)
    frequent = sorted(counts[: len(CYCLE) - 1])
    others = f"{len(counts) - len(frequent)} others"
    return np.array([name if name in frequent else others for name in values]), [*frequent, others]


def plot_attention(weights: xr.DataArray, layer: int, ax: Axes | None = None) -> Axes:
    """The attention weights of each token on the thoughts of a layer (from 0); uniform weights are white."""
    ax = axes_of(ax, 9, 2.2)
    of_layer, even = weights.isel(layer=layer).transpose("thought", "token"), 1 / weights.sizes["thought"]
    most = float(abs(weights - even).max()) or 1.0  # one scale for all layers
    image = ax.imshow(of_layer, aspect="auto", cmap="PuOr_r", vmin=even - most, vmax=even + most)
    ax.figure.colorbar(image, ax=ax, label="weight")
    thoughts = weights.sizes["thought"]
    title = f"Attention to the thoughts of layer {layer + 1} (white: 1/{thoughts})"
    ax.set_yticks(range(thoughts), [str(number) for number in range(1, thoughts + 1)])
    return plain(ax, title=title, xlabel="token", ylabel="thought")


def plot_shift(shift: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The KL to the prior by context length, one line per sequence, and the average."""
    ax = axes_of(ax)
    ax.plot(
        shift["context"], shift["kl_to_prior"].transpose("context", "sequence"), color=BLUE, alpha=0.2, linewidth=0.8
    )
    ax.plot(shift["context"], shift["kl_to_prior"].mean("sequence"), color=ORANGE, marker="o", label="average")
    ax.legend(fontsize=8, frameon=False)
    return plain(ax, title="KL by context length", xlabel="tokens of context", ylabel="KL to the prior (nats)")


def plot_scales(comparison: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Box plots of the scale of q divided by the chains' scale, by sequence; below 1 q is too narrow."""
    ax = axes_of(ax)
    ratios = np.log2(comparison["scale_ratio"].stack(coordinate=("layer", "thought", "dim")).values)
    names = [str(sequence) for sequence in range(len(ratios))]
    ax.boxplot(list(ratios), tick_labels=names, showfliers=False, medianprops={"color": BLUE})
    ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
    ticks: Any = [-1, 0, 1]
    plain(ax, title="Scale of q / scale of the chains", xlabel="sequence", ylabel="ratio")
    ax.set_yticks(ticks, ["1/2", "1", "2"])
    return ax


def plot_path(path: list[Any], ax: Axes | None = None) -> Axes:
    """The −log p(x | z) of two texts along the line between their thoughts, minus its value at their own."""
    ax = axes_of(ax)
    share = [step.share for step in path]
    ax.plot(share, [x.nats_first - path[0].nats_first for x in path], color=BLUE, marker="o", label="first text")
    ax.plot(share, [x.nats_second - path[-1].nats_second for x in path], color=ORANGE, marker="s", label="second text")
    ax.legend(fontsize=8, frameon=False)
    label = "nats per sequence above the text's own"
    return plain(ax, title="Interpolation between two texts", xlabel="weight of the second", ylabel=label)
