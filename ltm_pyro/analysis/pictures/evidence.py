"""A plot of models ranked by evidence."""

from matplotlib.axes import Axes

from ltm_pyro.analysis.model_comparison import Ranking
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, axes_of, plain


def plot_ranking(ranking: Ranking, ax: Axes | None = None) -> Axes:
    """By how much each model is behind the first, with two standard errors, and its stacking weight beside it."""
    found = ranking.candidates
    ax = axes_of(ax, 5.8, 1.2 + 0.4 * len(found))
    rows = range(len(found))
    bars = [0 if number == 0 else 2 * x.behind_stderr for number, x in enumerate(found)]
    ax.axvline(0, color=GREY, linestyle="--", linewidth=1)
    ax.errorbar([-x.behind for x in found], rows, xerr=bars, fmt="o", color=BLUE, capsize=3)
    ax.set_yticks(rows, [x.name for x in found])
    ax.invert_yaxis()
    for number, x in enumerate(found):
        ax.text(1.02, number, f"weight {x.weight:.2f}", transform=ax.get_yaxis_transform(), va="center", color=ORANGE)
    return plain(ax, title=f"Evidence of {ranking.documents} documents", xlabel="nats per document above the first")
