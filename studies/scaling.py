"""Does it scale? Held-out bound over training FLOPs, for model sizes, thoughts and fast steps, beside the baseline.

Every point of the grid trains until it has spent its FLOPs, fast steps included, so more fast steps mean fewer tokens.
T_fast = 0 without thoughts is the plain autoregressive decoder. Half of the FLOPs go to a decoder without thoughts, as
in the quickstart. Cheap points come first: a study that is stopped early has complete curves up to some budget.
"""

from itertools import product
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution

from ltm_pyro.studies.search.charts import png
from ltm_pyro.studies.search.definition import Row
from ltm_pyro.studies.search.files import recipe_file
from ltm_pyro.studies.search.fits import PowerLaw, power_law
from ltm_pyro.studies.search.objective import Values

WIDTHS, FLOPS = (32, 64, 96), (2.5e10, 5e10, 1e11, 2e11, 4e11)
THINKING = ((0, 0), (4, 2), (4, 8), (1, 8))  # (thoughts per layer K, T_fast)

recipe = recipe_file("scaling.yaml")
checks = False  # the baseline is on the grid
space = {
    "flops": CategoricalDistribution(FLOPS),
    "width": CategoricalDistribution(WIDTHS),
    "thoughts": CategoricalDistribution(sorted({k for k, _ in THINKING})),
    "steps": CategoricalDistribution(sorted({t for _, t in THINKING})),
}
points = tuple(
    {"flops": flops, "width": width, "thoughts": thoughts, "steps": steps}
    for flops, width, (thoughts, steps) in product(FLOPS, WIDTHS, THINKING)
)


def decoder(width: int, thoughts: int, steps: int) -> dict[str, Any]:
    """A model size, its thoughts and T_fast as recipe settings; the slow rate falls with the width (as in muP)."""
    later = [[0, 0], [0.5, 0], [0.5, steps], [1, steps]]
    return {
        "model.decoder.init_args.width": width,
        "model.decoder.init_args.heads": width // 16,
        "model.decoder.init_args.thoughts": thoughts,
        "model.curriculum.steps": later if thoughts else [[0, 0], [1, 0]],
        "model.slow.rate": 0.64 / width,
    }


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """A point of the grid; its FLOPs replace the study's budget."""
    chosen = {name: parameters[name] for name in ("width", "thoughts", "steps")}
    return decoder(**chosen) | {"model.max_flops": parameters["flops"]}


def analyse(rows: list[Row]) -> tuple[dict[str, bytes], list[str]]:
    """Iso-FLOP curves, the frontier over sizes with its power laws, and thinking against parameters."""
    points = [row["figures"] | row["parameters"] for row in rows if row["state"] == "complete"]  # flops: the budget
    ways = [way for way in THINKING if any((p["thoughts"], p["steps"]) == way for p in points)]
    frontiers = {way: _frontier([p for p in points if (p["thoughts"], p["steps"]) == way]) for way in ways}
    laws = {way: power_law(list(f), list(f.values())) for way, f in frontiers.items() if len(f) > 2}
    said = [f"{_name(way)}: lowest bound over sizes = {law}." for way, law in laws.items()]
    pictures = {"iso flop curves": _iso_flop(points, ways)}
    if any(frontiers.values()):  # a budget at which every size is there
        pictures["frontier"] = _draw(frontiers, laws)
    return pictures, said + _trade(points)


def _name(way: tuple[int, int]) -> str:
    return f"K = {way[0]}, T_fast = {way[1]}" if way[1] else "autoregressive"


def _frontier(points: list[Values]) -> dict[float, float]:
    """FLOPs to the lowest bound over sizes, where every size is there."""
    budgets = sorted({p["flops"] for p in points})
    bounds = {b: [p["bound"] for p in points if p["flops"] == b] for b in budgets}
    return {b: min(found) for b, found in bounds.items() if len(found) == len(WIDTHS)}


def _trade(points: list[Values]) -> list[str]:
    """At every budget: from the smallest thinking model, do four times the fast steps help more than the next size?"""
    at = {(p["flops"], p["width"], p["thoughts"], p["steps"]): p["bound"] for p in points}
    said = []
    for flops in FLOPS:
        small, thinking, larger = (at.get((flops, w, 4, t)) for w, t in ((32, 2), (32, 8), (64, 2)))
        if small and thinking and larger:
            said.append(
                f"At {flops:.3g} FLOPs, width 32 and T_fast 2: {small:.3f}; T_fast 8 instead: {thinking:.3f}; "
                f"width 64 instead: {larger:.3f}. More {'thinking' if thinking < larger else 'parameters'} won."
            )
    return said


def _iso_flop(points: list[Values], ways: list[tuple[int, int]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(ways), 3.4), layout="constrained")
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for panel, way in zip(panels, ways, strict=True):
        for flops in FLOPS:
            curve = [p for p in points if (p["thoughts"], p["steps"]) == way and p["flops"] == flops]
            curve.sort(key=lambda p: p["parameters"])
            panel.plot([p["parameters"] for p in curve], [p["bound"] for p in curve], "o-", label=f"{flops:.2g} FLOPs")
        panel.set(xscale="log", xlabel="parameters", title=_name(way))
    panels[0].set_ylabel("bound, nats per held-out token")
    panels[-1].legend()
    return png(figure)


def _draw(frontiers: dict[tuple[int, int], dict[float, float]], laws: dict[tuple[int, int], PowerLaw]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (way, frontier) in enumerate(frontiers.items()):
        color = f"C{index}"
        axes.plot(list(frontier), list(frontier.values()), "o", color=color, label=_name(way))
        if way in laws:
            x = np.geomspace(min(frontier), max(frontier))
            axes.plot(x, laws[way].at(x), color=color, label=f"exponent {laws[way].exponent:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="lowest bound over sizes, nats per token")
    axes.legend()
    return png(figure)
