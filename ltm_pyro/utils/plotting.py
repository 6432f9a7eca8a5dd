"""Shared by all plots: colours that colour-blind readers can tell apart, markers, and axes."""

from typing import Any  # axes are matplotlib's, an optional dependency

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#8A8A8A", "#C8102E"  # two of Okabe & Ito, and two for limits
CYCLE = [BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6A3D9A", "#5B5B5B"]
MARKERS = "os^DvPX*"  # one for each colour


def axes_of(ax: Any, width: float = 4.6, height: float = 3.0) -> Any:
    """The given axes, or the axes of a new figure."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def plain(ax: Any, **settings: Any) -> Any:
    """Sets labels, limits and the like by name, and removes the right and upper frame."""
    ax.set(**settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
