"""The picture of `ltm check-prior`: the spread of each site, and the effect of its draws in each layer."""

from matplotlib.figure import Figure

from ltm_pyro.analysis.prior_predictive import PriorPredictive
from ltm_pyro.utils.plotting import BLUE, GREY, plain


def plot_prior_predictive(found: PriorPredictive) -> Figure:
    """Two panels: 95 % of the draws of each site with their median, and what each layer adds, beside N(0, I)'s."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [x.site for x in found.sites]
    for place, x in enumerate(found.sites):
        least, low, median, high, most = x.quantiles
        left.plot([least, most], [place, place], color=GREY, linewidth=1)
        left.plot([low, high], [place, place], color=BLUE, linewidth=5, solid_capstyle="butt")
        left.plot([median], [place], marker="o", color="white", markeredgecolor=BLUE)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(-0.6, len(names) - 0.4)
    plain(left, title="Draws: all, 95 %, median", xlabel="value")
    layers = [*found.effect.added]
    places = range(len(layers))
    right.bar([x - 0.2 for x in places], [found.effect.added[x] for x in layers], 0.4, color=BLUE, label=found.prior)
    normal = found.effect_of_standard_normal.added
    right.bar([x + 0.2 for x in places], [normal[x] for x in layers], 0.4, color=GREY, label="N(0, I)")
    right.set_xlim(-1, len(layers))
    right.set_xticks(places, [str(layer) for layer in layers])
    right.legend(frameon=False, fontsize=8)
    plain(right, title="Effect on the decoder", xlabel="layer", ylabel="RMS relative to hidden states")
    return figure
