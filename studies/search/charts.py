"""Charts of a study: the history of the search, which parameters matter, and which values of them are good."""

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.plotting import BLUE, GREY, ORANGE, plain

MOST = 4  # parameters side by side
Panels = list[Any]  # of matplotlib


class Parameter(NamedTuple):
    """A searched parameter: the position of every trial on its axis, and how the axis is labelled."""

    name: str
    at: np.ndarray
    log: bool
    choices: tuple[str, ...]

    @property
    def fractions(self) -> np.ndarray:
        """The positions as fractions of their range, on the parameter's own scale."""
        at = np.log(self.at) if self.log else self.at
        return (at - at.min()) / (at.max() - at.min())

    def label(self, panel: Any, side: str) -> None:
        """Name, scale and ticks of a panel's ``x`` or ``y`` axis."""
        from matplotlib.ticker import LogLocator, NullFormatter

        axis = getattr(panel, f"{side}axis")
        axis.set_label_text(self.name)
        if self.choices:
            axis.set_ticks(range(len(self.choices)), self.choices)
        if self.log:
            getattr(panel, f"set_{side}scale")("log")
            narrow = self.at.max() < 50 * self.at.min()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def charts(study: optuna.Study, objectives: Sequence[str], trials: Sequence[FrozenTrial]) -> dict[str, bytes]:
    """Title to PNG, for every picture that the trials so far allow."""
    extra("matplotlib", "plots", "A report with pictures")
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter(
            "ignore", UserWarning
        )  # the importance warns that it assumes low values are good, as they are here
        return {title: png(plot()) for title, plot in _plots(study, objectives, trials, complete)}


def _plots(
    study: optuna.Study, objectives: Sequence[str], trials: Sequence[FrozenTrial], complete: list[FrozenTrial]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    if not complete:
        return
    varied = _varied(complete)
    if len(objectives) > 1:
        yield "pareto front", partial(_front, study, objectives, complete)
    for index, name in enumerate(objectives):
        values = np.array([t.values[index] for t in complete])
        yield f"history of {name}", partial(_history, name, trials, complete, values)
        if varied:
            yield f"slices of {name}", partial(_slices, name, varied, values)
        if len(varied) > 1 and len(complete) > 3:
            yield f"importance for {name}", partial(_importance, study, index)
            yield f"contours of {name}", partial(_contours, name, varied, values)
            yield f"parallel coordinates of {name}", partial(_parallel, name, varied, values)


def _varied(complete: list[FrozenTrial]) -> list[Parameter]:
    found = [_parameter(name, d, [t.params[name] for t in complete]) for name, d in complete[0].distributions.items()]
    return [p for p in found if len(set(p.at)) > 1]


def _parameter(name: str, distribution: BaseDistribution, values: list[Any]) -> Parameter:
    short = name.rsplit(".", 1)[-1]
    if isinstance(distribution, CategoricalDistribution):
        at = [distribution.choices.index(value) for value in values]
        return Parameter(short, np.array(at, float), False, tuple(map(_short, distribution.choices)))
    return Parameter(short, np.array(values, float), getattr(distribution, "log", False), ())


def _short(choice: Any) -> str:
    return f"{choice:g}" if isinstance(choice, float) else str(choice)


def _figure(columns: int = 1, width: float = 3.4, height: float = 3.2, **options: Any) -> tuple[Any, Panels]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 5.5), height), layout="constrained")
    return figure, [plain(panel) for panel in figure.subplots(1, columns, squeeze=False, **options)[0]]


def _history(name: str, trials: Sequence[FrozenTrial], complete: list[FrozenTrial], values: np.ndarray) -> Any:
    figure, (panel,) = _figure(width=7.5)
    numbers = [t.number for t in complete]
    panel.plot(numbers, values, "o", color=BLUE, label="complete")
    panel.step(numbers, np.minimum.accumulate(values), where="post", color=ORANGE, label="lowest so far")
    lost = [t.number for t in trials if t.state in (TrialState.FAIL, TrialState.PRUNED)]
    if lost:
        panel.plot(lost, [values.max()] * len(lost), "x", color=GREY, label="pruned or failed (no figure)")
    panel.set(xlabel="trial", ylabel=name)
    panel.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _slices(name: str, varied: list[Parameter], values: np.ndarray) -> Any:
    figure, panels = _figure(len(varied[:MOST]), sharey=True)
    for panel, parameter in zip(panels, varied, strict=False):
        panel.plot(parameter.at, values, "o", color=BLUE, alpha=0.7)
        panel.plot(parameter.at[values.argmin()], values.min(), "o", color=ORANGE, markersize=9, label="lowest")
        parameter.label(panel, "x")
    panels[0].set_ylabel(name)
    panels[-1].legend(frameon=False)
    return figure


def _importance(study: optuna.Study, index: int) -> Any:
    found = get_param_importances(study, target=lambda trial: trial.values[index])
    figure, (panel,) = _figure(width=7.5, height=1 + 0.4 * len(found))
    names = [name.rsplit(".", 1)[-1] for name in found]
    panel.bar_label(panel.barh(names, list(found.values()), color=BLUE), fmt="%.2f", padding=3)
    panel.set(xlabel="share of the objective's variation", xlim=(0, 1.1))
    panel.invert_yaxis()
    return figure


def _contours(name: str, varied: list[Parameter], values: np.ndarray) -> Any:
    """Every pair; between numbers the surface is interpolated, which says little between distant points."""
    pairs = list(combinations(varied[:3], 2))
    figure, panels = _figure(len(pairs))
    levels = np.linspace(
        values.min(), np.quantile(values, 0.9) + 1e-9, 9
    )  # or the worst tenth would hide the differences among the rest
    for panel, (x, y) in zip(panels, pairs, strict=True):
        x.label(panel, "x")
        y.label(panel, "y")
        if not x.choices and not y.choices and len({*zip(x.at, y.at, strict=True)}) > 5:
            panel.tricontourf(x.at, y.at, values, levels, cmap="viridis", extend="both", alpha=0.75)
        dots = panel.scatter(x.at, y.at, c=values, cmap="viridis", vmin=levels[0], vmax=levels[-1], edgecolors="white")
    figure.colorbar(dots, ax=panels, label=name, extend="max")
    return figure


def _parallel(name: str, varied: list[Parameter], values: np.ndarray) -> Any:
    figure, (panel,) = _figure(width=2 * len(varied) + 2)
    order = np.argsort(values)[::-1]
    rank = np.empty(len(values))
    rank[order] = np.linspace(0.12, 1, len(values))
    lines = np.stack([p.fractions for p in varied], axis=1)
    for trial in order[:-1]:
        panel.plot(lines[trial], color=BLUE, linewidth=1.2, alpha=float(rank[trial]))
    panel.plot(lines[order[-1]], color=ORANGE, linewidth=3, label="lowest")
    panel.set_xticks(range(len(varied)), [p.name for p in varied])
    panel.set_yticks([])
    for place, p in enumerate(varied):
        low, high = (p.choices[round(x)] if p.choices else f"{x:.3g}" for x in (p.at.min(), p.at.max()))
        panel.text(place, -0.04, low, ha="center", va="top")
        panel.text(place, 1.04, high, ha="center", va="bottom")
    panel.set(ylim=(-0.15, 1.15), title=f"darker is a lower {name}")
    panel.tick_params(axis="x", length=0)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _front(study: optuna.Study, objectives: Sequence[str], complete: list[FrozenTrial]) -> Any:
    """The first two objectives; a trial is on the front when no other is better in all of them."""
    figure, (panel,) = _figure(width=7.5)
    front = sorted((t.values[0], t.values[1]) for t in study.best_trials)
    panel.plot([t.values[0] for t in complete], [t.values[1] for t in complete], "o", color=BLUE, label="complete")
    panel.plot(*zip(*front, strict=True), "o-", color=ORANGE, label="Pareto front") if front else None
    panel.set(xlabel=objectives[0], ylabel=objectives[1])
    panel.legend(frameon=False)
    return figure


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def embedded(image: bytes, title: str) -> str:
    """An HTML image that carries its own bytes, and can be moved sideways where it does not fit."""
    data = base64.b64encode(image).decode()
    return f'<div class="table"><img alt="{title}" src="data:image/png;base64,{data}"></div>'
