"""What do fast steps buy, in training and at test time, beside a larger model at equal training FLOPs?

The paper trades "reasoning steps for size". Here T_fast in training goes from 1 to 16 and the width over a factor of 4,
with two seeds each; every trained model is scored after 0 to 32 fast steps. T_fast = 0 is the plain autoregressive
decoder.
"""

import math
from itertools import product
from statistics import mean
from typing import Any

from optuna.distributions import CategoricalDistribution

from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.configure import Values, recipe_file
from ltm_pyro.studies.scaling import decoder
from ltm_pyro.studies.search import Setting, score, train_and_score
from ltm_pyro.studies.search.charts import png
from ltm_pyro.studies.search.definition import Row

WIDTHS, TRAINED, TESTED = (16, 32, 64), (0, 1, 2, 4, 8, 16), (0, 4, 16, 32)
SEEDS = 2

recipe = recipe_file("scaling.yaml")
checks = False  # the baseline is on the grid
space = {"width": CategoricalDistribution(WIDTHS), "steps": CategoricalDistribution(TRAINED)}
figures = tuple(f"{figure}_at_{steps}" for figure, steps in product(("bound", "gain"), TESTED))
points = tuple({"width": width, "steps": steps} for _, width, steps in product(range(SEEDS), WIDTHS, TRAINED))


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Width and T_fast; without fast steps there are no thoughts."""
    return decoder(parameters["width"], 4 if parameters["steps"] else 0, parameters["steps"])


def objective(setting: Setting) -> dict[str, float]:
    """Those of `train_and_score`; after each number of fast steps at test time the bound and the predictive gain.

    They are ``bound_at_16``, ``gain_at_16`` and so on.
    """
    figures = train_and_score(setting)
    run = load_run(setting.run)
    tested = TESTED if setting.parameters["steps"] and "bound" in figures else ()
    for steps in tested:
        found = score(run, setting, steps)
        figures |= {f"bound_at_{steps}": found["bound"], f"gain_at_{steps}": found.get("predictive_gain", math.nan)}
    return figures


Grid = dict[int, dict[int, list[Values]]]  # width, T_fast: the figures of every seed


def analyse(rows: list[Row]) -> tuple[dict[str, bytes], list[str]]:
    """The bound over T_fast in training and over fast steps at test time, one line a width or a T_fast."""
    grid: Grid = {}
    for row in (row for row in rows if row["state"] == "complete"):
        at = row["parameters"]
        grid.setdefault(at["width"], {}).setdefault(at["steps"], []).append(row["figures"])
    said = [_verdict(width, grid[width]) for width in WIDTHS if len(grid.get(width, {})) > 1 and 0 in grid[width]]
    return {"fast steps in training": _training(grid), "fast steps at test time": _testing(grid)}, said


def _mean(points: list[Values], figure: str = "bound") -> float:
    return mean(math.nan if point[figure] is None else point[figure] for point in points)


def _verdict(width: int, trained: dict[int, list[Values]]) -> str:
    best = min((t for t in trained if t), key=lambda t: _mean(trained[t]))
    return (
        f"Width {width}: T_fast {best} is best, {_mean(trained[best]):.3f}; autoregressive {_mean(trained[0]):.3f}; "
        f"means of {min(map(len, trained.values()))} seeds or more."
    )


def _training(grid: Grid) -> bytes:
    figure, axes = _axes("T_fast in training")
    for index, (width, trained) in enumerate(sorted(grid.items())):
        color, thinking = f"C{index}", {t: trained[t] for t in sorted(trained) if t}
        axes.plot(list(thinking), [_mean(p) for p in thinking.values()], color=color, label=f"width {width}")
        dots = [(t, point["bound"]) for t, points in thinking.items() for point in points]
        axes.plot([t for t, _ in dots], [bound for _, bound in dots], "o", color=color, markersize=4)
        if 0 in trained:
            axes.axhline(_mean(trained[0]), color=color, linestyle=":", label="autoregressive")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    return png(figure)


def _testing(grid: Grid) -> bytes:
    """What z is worth for predicting the next block, from the text before it."""
    figure, *panels = _axes("fast steps at test time", "predictive gain, nats per held-out token", len(grid))
    for axes, (width, trained) in zip(panels, sorted(grid.items()), strict=True):
        for steps, points in sorted((t, p) for t, p in trained.items() if t):
            gains = [_mean(points, f"gain_at_{t}") for t in TESTED]
            axes.plot(TESTED, gains, "o-", color=f"C{TRAINED.index(steps)}", label=f"trained with {steps}")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_title(f"width {width}")
    panels[-1].legend(fontsize="small") if panels[-1].get_legend_handles_labels()[0] else None
    return png(figure)


def _axes(x: str, y: str = "bound, nats per held-out token", columns: int = 1) -> tuple[Any, ...]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns + 2.8, 4), layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.set_xlabel(x)
    panels[0].set_ylabel(y)
    return figure, *panels
