"""Does it scale? Held-out bound over training FLOPs, for model sizes, thoughts and fast steps, beside the baseline.

Every point of the grid trains until it has spent its FLOPs, fast steps included, so more fast steps mean fewer tokens.
T_fast = 0 without thoughts is the plain autoregressive decoder. Half of the FLOPs go to a decoder without thoughts, as
in `prose.yaml`. Every point is run for two seeds, cheap budgets first: a study that is stopped early has complete
curves up to some budget, and knows what another seed changes there.
"""

from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import CategoricalDistribution

from ltm_pyro.studies.configure import recipe_file
from ltm_pyro.studies.search.charts import png
from ltm_pyro.studies.search.definition import Row
from ltm_pyro.studies.search.fits import PowerLaw, power_law

Widths = dict[float, tuple[int, ...]]  # by FLOPs
WIDTHS: Widths = {1e11: (8, 16, 32), 4e11: (16, 32, 64), 1.6e12: (32, 64, 96)}  # around the best of each budget
SEEDS = 2
Way = tuple[int, int]  # (thoughts per layer K, T_fast)
WAYS: tuple[Way, ...] = ((0, 0), (4, 2), (4, 8), (16, 2))


def space_of(widths: Widths) -> dict[str, CategoricalDistribution]:
    """The study's space for some budgets and widths."""
    return {
        "flops": CategoricalDistribution(list(widths)),
        "width": CategoricalDistribution(sorted({width for some in widths.values() for width in some})),
        "thoughts": CategoricalDistribution(sorted({k for k, _ in WAYS})),
        "steps": CategoricalDistribution(sorted({t for _, t in WAYS})),
    }


def points_of(widths: Widths, ways: tuple[Way, ...] = WAYS) -> tuple[dict[str, Any], ...]:
    """The grid, budget by budget and seed by seed."""
    return tuple(
        {"flops": flops, "width": width, "thoughts": thoughts, "steps": steps}
        for (flops, some), _ in product(widths.items(), range(SEEDS))
        for width, (thoughts, steps) in product(some, ways)
    )


recipe = recipe_file("scaling.yaml")
checks = False  # the baseline is on the grid
space = space_of(WIDTHS)
points = points_of(WIDTHS)


class Point(NamedTuple):
    """One place of the grid: its parameter count, and the bound of every seed."""

    parameters: float
    bounds: list[float]


Grid = dict[Way, dict[float, dict[int, Point]]]  # way, FLOPs, width
Frontier = tuple[list[float], list[float]]  # FLOPs, bounds


def decoder(width: int, thoughts: int, steps: int) -> dict[str, Any]:
    """A model size, its thoughts and T_fast as recipe settings; the slow rate falls with the width (as in muP)."""
    later = [[0, 0], [0.5, 0], [0.5, steps], [1, steps]]
    return {
        "model.decoder.init_args.width": width,
        "model.decoder.init_args.heads": max(1, width // 16),
        "model.decoder.init_args.thoughts": thoughts,
        "model.curriculum.steps": later if thoughts else [[0, 0], [1, 0]],
        "model.slow.rate": 0.64 / width,
    }


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """A point of the grid; its FLOPs replace the study's budget."""
    chosen = {name: parameters[name] for name in ("width", "thoughts", "steps")}
    return decoder(**chosen) | {"model.max_flops": parameters["flops"]}


def analyse(rows: list[Row], widths: Widths = WIDTHS) -> tuple[dict[str, bytes], list[str]]:
    """Iso-FLOP curves, the frontier over sizes with its power laws, and thinking against parameters."""
    grid = _grid(rows)
    frontiers = {way: frontier for way in grid if (frontier := _frontier(grid[way], widths))[0]}
    laws = {way: power_law(*points) for way, points in frontiers.items() if len({*points[0]}) > 2}
    said = [f"{_name(way)}: bound of the best size = {law}." for way, law in laws.items()]
    pictures = {"iso flop curves": _iso_flop(grid)}
    if frontiers:  # some budget has every size
        pictures["frontier"] = _plot_frontiers(frontiers, laws)
    return pictures, [*said, *filter(None, (_trade(grid, flops, some) for flops, some in widths.items()))]


def _grid(rows: list[Row]) -> Grid:
    grid: Grid = {}
    for row in (row for row in rows if row["state"] == "complete"):
        at, figures = row["parameters"], row["figures"]
        sizes = grid.setdefault((at["thoughts"], at["steps"]), {}).setdefault(at["flops"], {})
        sizes.setdefault(at["width"], Point(figures["parameters"], [])).bounds.append(figures["bound"])
    return {way: grid[way] for way in WAYS if way in grid}


def _name(way: Way) -> str:
    return f"K = {way[0]}, T_fast = {way[1]}" if way[1] else "autoregressive"


def _frontier(budgets: dict[float, dict[int, Point]], widths: Widths) -> Frontier:
    """FLOPs and bound of every seed at the size with the lowest mean, for budgets that have all sizes."""
    best = {
        flops: min(sizes.values(), key=lambda point: mean(point.bounds))
        for flops, sizes in sorted(budgets.items())
        if len(sizes) == len(widths[flops])
    }
    flops = [flops for flops, point in best.items() for _ in point.bounds]
    return flops, [bound for point in best.values() for bound in point.bounds]


def _trade(grid: Grid, flops: float, widths: tuple[int, ...]) -> str:
    """From the smallest thinking model at a budget: do four times the fast steps help more than the next size?"""
    small, larger, *_ = widths
    places = (((4, 2), small), ((4, 8), small), ((4, 2), larger))
    found = [grid.get(way, {}).get(flops, {}).get(width) for way, width in places]
    if None in found:
        return ""
    base, thinking, parameters = (mean(point.bounds) for point in found if point)
    return (
        f"At {flops:.3g} FLOPs, width {small} and T_fast 2: {base:.3f}; T_fast 8 instead: {thinking:.3f}; "
        f"width {larger} instead: {parameters:.3f}. More {'thinking' if thinking < parameters else 'parameters'} won."
    )


def _iso_flop(grid: Grid) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(grid), 3.6), layout="constrained")
    panels = figure.subplots(1, len(grid), sharey=True, squeeze=False)[0]
    for panel, (way, budgets) in zip(panels, grid.items(), strict=True):
        for index, (flops, sizes) in enumerate(sorted(budgets.items())):
            curve = sorted(sizes.values())
            size = [point.parameters for point in curve]
            panel.plot(size, [mean(point.bounds) for point in curve], color=f"C{index}", label=f"{flops:.2g} FLOPs")
            dots = [(point.parameters, bound) for point in curve for bound in point.bounds]
            panel.plot(*zip(*dots, strict=True), "o", color=f"C{index}", markersize=4)
        panel.set(xscale="log", xlabel="parameters", title=_name(way))
    panels[0].set_ylabel("bound, nats per held-out token")
    panels[-1].legend(fontsize="small")
    return png(figure)


def _plot_frontiers(frontiers: dict[Way, Frontier], laws: dict[Way, PowerLaw]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (way, (flops, bounds)) in enumerate(frontiers.items()):
        axes.plot(flops, bounds, "o", color=f"C{index}", label=_name(way))
        if way in laws:
            x = np.geomspace(min(flops), max(flops))
            axes.plot(x, laws[way].at(x), color=f"C{index}", label=f"exponent {laws[way].exponent:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="bound of the best size, nats per token")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize="small")
    return png(figure)
