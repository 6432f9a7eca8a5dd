"""What do fast steps buy, in training and at test time, beside a larger model at equal training FLOPs?

The paper trades "reasoning steps for size". Here T_fast in training goes from 1 to 16 and the width over a factor of 3;
every trained model is scored after 0 to 32 fast steps. T_fast = 0 is the plain autoregressive decoder.
"""

from itertools import product
from typing import Any

from optuna.distributions import CategoricalDistribution

from ltm_pyro.runs import load_run
from ltm_pyro.studies.scaling import WIDTHS, decoder
from ltm_pyro.studies.search import Setting, score, train_and_score
from ltm_pyro.studies.search.charts import png
from ltm_pyro.studies.search.definition import Row
from ltm_pyro.studies.search.files import recipe_file
from ltm_pyro.studies.search.objective import Values

TRAINED, TESTED = (0, 1, 2, 4, 8, 16), (0, 4, 16, 32)

recipe = recipe_file("scaling.yaml")
checks = False  # the baseline is on the grid
space = {"width": CategoricalDistribution(WIDTHS), "steps": CategoricalDistribution(TRAINED)}
points = tuple({"width": width, "steps": steps} for width, steps in product(WIDTHS, TRAINED))


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """Width and T_fast; without fast steps there is no use for thoughts."""
    return decoder(parameters["width"], 4 if parameters["steps"] else 0, parameters["steps"])


def objective(setting: Setting) -> dict[str, float]:
    """What `train_and_score` says, and the bound after every number of fast steps at test time (``bound_at_16``)."""
    figures = train_and_score(setting)
    run = load_run(setting.run)
    tested = TESTED if setting.parameters["steps"] else ()
    return figures | {f"bound_at_{steps}": score(run, setting, steps)["bound"] for steps in tested}


def analyse(rows: list[Row]) -> tuple[dict[str, bytes], list[str]]:
    """The bound over T_fast in training, one line a width, and over fast steps at test time for the largest width."""
    points = [row["figures"] | row["parameters"] for row in rows if row["state"] == "complete"]
    at = {(p["width"], p["steps"]): p for p in points}
    said = []
    for width in WIDTHS:
        bounds = {t: at[width, t]["bound"] for t in TRAINED if (width, t) in at}
        thinking = {t: bound for t, bound in bounds.items() if t}
        if thinking and 0 in bounds:
            best = min(thinking, key=thinking.__getitem__)
            said.append(f"Width {width}: T_fast {best} is best, {thinking[best]:.3f}; autoregressive {bounds[0]:.3f}.")
    return {"fast steps in training": _training(at), "fast steps at test time": _testing(points)}, said


def _training(at: dict[tuple[int, int], Values]) -> bytes:
    figure, axes = _axes("T_fast in training")
    for index, width in enumerate(WIDTHS):
        curve = [(t, at[width, t]["bound"]) for t in TRAINED if t and (width, t) in at]
        if curve:
            axes.plot(*zip(*curve, strict=True), "o-", color=f"C{index}", label=f"width {width}")
        if (width, 0) in at:
            axes.axhline(at[width, 0]["bound"], color=f"C{index}", linestyle=":", label="autoregressive")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    return png(figure)


def _testing(points: list[Values]) -> bytes:
    figure, axes = _axes("fast steps at test time")
    thinking = [p for p in points if p["steps"]]
    for p in (p for p in thinking if p["width"] == max(q["width"] for q in thinking)):
        axes.plot(TESTED, [p[f"bound_at_{t}"] for t in TESTED], "o-", label=f"trained with {p['steps']}")
    axes.legend(fontsize="small") if thinking else None
    return png(figure)


def _axes(label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=label, ylabel="bound, nats per held-out token")
    return figure, axes
