"""What all pictures have in common: colours that colour-blind readers can tell apart, and where a picture goes."""

from typing import Any  # axes are matplotlib's, which not everybody has installed

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#8A8A8A", "#C8102E"  # Okabe & Ito's, and two for limits
CYCLE = [BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6A3D9A", "#5B5B5B"]
MARKERS = "os^DvPX*"  # one a colour, for those who see few


def axes_of(ax: Any, width: float = 4.6, height: float = 3.0) -> Any:
    """The axes given, or those of a figure of their own."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def plain(ax: Any, **settings: Any) -> Any:
    """Labels and limits by name, and no frame on the right and above."""
    ax.set(**settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
