"""Charts of a study: the history of the search, which parameters matter, and which values of them are good."""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from itertools import combinations
from statistics import mean
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
ENOUGH, RESAMPLES = 10, 20  # complete trials for an importance, and bootstrap samples of them for its uncertainty
Panels = list[Any]  # of matplotlib
Row = Mapping[str, Any]


class Picture(NamedTuple):
    """A picture as PNG, and as SVG with a text for every trial under the pointer, where that helps.

    Pictures of one ``group`` stand side by side where there is room.
    """

    png: bytes
    svg: str = ""
    group: str = ""

    def html(self, title: str) -> str:
        """An element that carries its own bytes."""
        data = base64.b64encode(self.png).decode()
        return self.svg or f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


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
            if side == "x" and sum(map(len, self.choices)) > 24:
                panel.tick_params(axis="x", rotation=30)
                for text in panel.get_xticklabels():
                    text.set(ha="right", rotation_mode="anchor")
        if self.log:
            getattr(panel, f"set_{side}scale")("log")
            narrow = self.at.max() < 50 * self.at.min()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def charts(study: optuna.Study, found: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> dict[str, Picture]:
    """Title to picture, for all that the trials so far allow; ``found`` is what `describe` says of the study."""
    extra("matplotlib", "plots", "A report with pictures")
    complete = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.number)
    names = (*found["minimise"], *found["maximise"])
    hover = {row["number"]: _hover(row, names) for row in found["trials"] if row["role"] in ("trial", "added")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # the importance warns that it assumes low values are good
        pictures = {}
        for title, group, plot in _plots(study, found, trials, complete):
            figure = plot()
            hovered = group in ("history", "slices", "front")
            pictures[title] = Picture(png(figure), _svg(figure, title, hover) if hovered else "", group)
        return pictures


def _plots(
    study: optuna.Study, found: Mapping[str, Any], trials: Sequence[FrozenTrial], complete: list[FrozenTrial]
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    if not complete:
        return
    varied = _varied(complete)
    objectives = [*((name, 1) for name in found["minimise"]), *((name, -1) for name in found["maximise"])]
    if len(objectives) > 1:
        yield "pareto front", "front", partial(_front, [name for name, _ in objectives], complete, found["front"])
    for index, (name, sign) in enumerate(objectives):
        values = np.array([t.values[index] for t in complete])
        baseline = next((r["figures"].get(name) for r in found["trials"] if r["role"] == "baseline"), None)
        yield f"history of {name}", "history", partial(_history, name, sign, trials, complete, values, baseline)
        again = _seeds_of(found, name) if index == 0 else {}
        if again:
            yield f"seeds of {name}", "seeds", partial(_seeds, name, again, baseline)
        for parameter in varied[:MOST]:
            title = f"{name} over {parameter.name}"
            yield title, "slices", partial(_slice, name, sign, parameter, complete, values, baseline)
        if len(varied) > 1 and len(complete) >= ENOUGH:
            yield f"importance for {name}", "", partial(_importance, study, index, complete, varied)
        if len(varied) > 1 and len(complete) > 3:
            for x, y in combinations(varied[:3], 2):
                title = f"{name} over {x.name} and {y.name}"
                yield title, "contours", partial(_contour, name, sign, x, y, values)
            yield f"parallel coordinates of {name}", "", partial(_parallel, name, sign, varied, values)


def _hover(row: Row, names: Sequence[str]) -> str:
    """What is said of a trial under the pointer."""
    parameters = ", ".join(f"{k} = {_short(v)}" for k, v in row["parameters"].items())
    figures = [f"{k} {_short(v)}" for k, v in row["figures"].items() if k in names or k == "bound_stderr"]
    told = ", ".join(figures) or row["reason"] or row["state"]
    return f"trial {row['number']}, seed {row['seed']}: {told}\n{parameters}"


def _seeds_of(found: Mapping[str, Any], name: str) -> dict[int, list[float]]:
    """The fresh seeds' figures of every setting that was trained again."""
    again: dict[int, list[float]] = {}
    for row in found["trials"]:
        if row["role"] == "repeat" and row["state"] == "complete":
            again.setdefault(row["of"], []).append(row["figures"][name])
    return again


def _varied(complete: list[FrozenTrial]) -> list[Parameter]:
    """The parameters that every trial has and that were not the same in all."""
    everywhere = [n for n in complete[0].params if all(n in t.params for t in complete)]
    known = {n: next((t.distributions[n] for t in complete if n in t.distributions), None) for n in everywhere}
    found = [_parameter(n, d, [t.params[n] for t in complete]) for n, d in known.items() if d is not None]
    return [p for p in found if len(set(p.at)) > 1]


def _parameter(name: str, distribution: BaseDistribution, values: list[Any]) -> Parameter:
    short = name.rsplit(".", 1)[-1]
    if isinstance(distribution, CategoricalDistribution):
        at = [distribution.choices.index(value) for value in values]
        return Parameter(short, np.array(at, float), False, tuple(map(_short, distribution.choices)))
    return Parameter(short, np.array(values, float), getattr(distribution, "log", False), ())


def _short(choice: Any) -> str:
    """A value in a few letters: of a class's dotted path its name."""
    if isinstance(choice, float):
        return f"{choice:.4g}"
    return re.sub(r"^(?:\w+\.)+(?=[A-Z]\w*$)", "", str(choice))


def _figure(columns: int = 1, width: float = 3.4, height: float = 3.2, **options: Any) -> tuple[Any, Panels]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 5.5), height), layout="constrained")
    return figure, [plain(panel) for panel in figure.subplots(1, columns, squeeze=False, **options)[0]]


def _history(
    name: str,
    sign: int,
    trials: Sequence[FrozenTrial],
    complete: list[FrozenTrial],
    values: np.ndarray,
    baseline: float | None,
) -> Any:
    figure, (panel,) = _figure(width=5.5)
    numbers = [t.number for t in complete]
    _dots(panel, numbers, values, complete)
    best = np.minimum.accumulate(values) if sign > 0 else np.maximum.accumulate(values)
    panel.step(numbers, best, where="post", color=ORANGE, label="best so far")
    lost = [t.number for t in trials if t.state in (TrialState.FAIL, TrialState.PRUNED)]
    worst = values.max() if sign > 0 else values.min()
    for index, number in enumerate(lost):
        label = "pruned or failed (no figure)" if index == 0 else None
        panel.plot([number], [worst], "x", color=GREY, gid=f"trial-{number}", label=label)
    _baseline(panel, baseline)
    panel.set(xlabel="trial", ylabel=name)
    panel.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return figure


def _dots(panel: Any, at: Any, values: np.ndarray, complete: list[FrozenTrial]) -> None:
    """Every trial as an element of its own, so that the SVG can say which it is."""
    for index, (x, y, trial) in enumerate(zip(at, values, complete, strict=True)):
        label = "complete" if index == 0 else None
        panel.plot([x], [y], "o", color=BLUE, alpha=0.8, gid=f"trial-{trial.number}", label=label)


def _baseline(panel: Any, value: float | None) -> None:
    if value is not None:
        panel.axhline(value, color=GREY, linestyle="--", label="baseline without thoughts")


def _slice(
    name: str, sign: int, parameter: Parameter, complete: list[FrozenTrial], values: np.ndarray, baseline: float | None
) -> Any:
    figure, (panel,) = _figure(width=5)
    best = values.argmin() if sign > 0 else values.argmax()
    panel.plot(parameter.at[best], values[best], "o", color=ORANGE, markersize=11)
    _dots(panel, parameter.at, values, complete)
    _baseline(panel, baseline)
    parameter.label(panel, "x")
    panel.set_ylabel(name)
    return figure


def _seeds(name: str, again: dict[int, list[float]], baseline: float | None) -> Any:
    """Every fresh seed of the settings that were trained again, and their mean."""
    figure, (panel,) = _figure(width=5.5)
    ordered = sorted(again.items(), key=lambda item: mean(item[1]))
    for place, (_, values) in enumerate(ordered):
        panel.plot([place] * len(values), values, "o", color=BLUE, alpha=0.7)
        panel.plot([place - 0.2, place + 0.2], [mean(values)] * 2, color=ORANGE, linewidth=2)
    _baseline(panel, baseline)
    panel.set_xticks(range(len(ordered)), [f"trial {number}" for number, _ in ordered])
    panel.set(ylabel=f"{name}, fresh seeds and mean")
    return figure


def importance(
    study: optuna.Study, index: int, complete: Sequence[FrozenTrial], names: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Share of the objective's variation by parameter, most first, with a 90 % bootstrap interval over trials."""
    draw = np.random.default_rng(0)

    def shares(trials: Sequence[FrozenTrial]) -> dict[str, float]:
        copy = optuna.create_study(directions=study.directions)
        copy.add_trials(trials)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0, n_trees=32)
        return get_param_importances(
            copy, evaluator=evaluator, params=list(names), target=lambda trial: float(trial.values[index])
        )

    samples = [
        shares([complete[i] for i in draw.integers(len(complete), size=len(complete))]) for _ in range(RESAMPLES)
    ]
    found = {}
    for name, share in shares(complete).items():
        low, high = np.quantile([sample.get(name, 0.0) for sample in samples], [0.05, 0.95])
        found[name] = share, float(low), float(high)
    return found


def _importance(study: optuna.Study, index: int, complete: list[FrozenTrial], varied: list[Parameter]) -> Any:
    full = {name.rsplit(".", 1)[-1]: name for name in complete[0].params}
    found = importance(study, index, complete, [full[p.name] for p in varied])
    figure, (panel,) = _figure(width=5.5, height=1.4 + 0.4 * len(found))
    names = [name.rsplit(".", 1)[-1] for name in found]
    shares = [share for share, _, _ in found.values()]
    panel.barh(names, shares, color=BLUE)
    for place, (_, low, high) in enumerate(found.values()):
        panel.plot([low, high], [place, place], color=ORANGE, linewidth=2)
    panel.set(
        xlabel=f"share of the variation over {len(complete)} trials\n(orange: 90 % interval by resampling them)",
        xlim=(0, 1.05),
    )
    panel.invert_yaxis()
    return figure


def _contour(name: str, sign: int, x: Parameter, y: Parameter, values: np.ndarray) -> Any:
    """A pair; between numbers the surface is interpolated, which says little between distant points."""
    figure, (panel,) = _figure(width=5)
    low, high = (values.min(), np.quantile(values, 0.9)) if sign > 0 else (np.quantile(values, 0.1), values.max())
    levels = np.linspace(low, high + 1e-9, 9)  # the worst tenth would hide the differences among the rest
    x.label(panel, "x")
    y.label(panel, "y")
    if not x.choices and not y.choices and len({*zip(x.at, y.at, strict=True)}) > 5:
        panel.tricontourf(x.at, y.at, values, levels, cmap="viridis", extend="both", alpha=0.75)
    dots = panel.scatter(x.at, y.at, c=values, cmap="viridis", vmin=levels[0], vmax=levels[-1], edgecolors="white")
    figure.colorbar(dots, ax=panel, label=name, extend="both")
    return figure


def _parallel(name: str, sign: int, varied: list[Parameter], values: np.ndarray) -> Any:
    figure, (panel,) = _figure(width=2 * len(varied) + 2)
    order = np.argsort(sign * values)[::-1]
    rank = np.empty(len(values))
    rank[order] = np.linspace(0.12, 1, len(values))
    lines = np.stack([p.fractions for p in varied], axis=1)
    for trial in order[:-1]:
        panel.plot(lines[trial], color=BLUE, linewidth=1.2, alpha=float(rank[trial]))
    panel.plot(lines[order[-1]], color=ORANGE, linewidth=3, label="best")
    panel.set_xticks(range(len(varied)), [p.name for p in varied])
    panel.set_yticks([])
    for place, p in enumerate(varied):
        low, high = (p.choices[round(x)] if p.choices else f"{x:.3g}" for x in (p.at.min(), p.at.max()))
        panel.text(place, -0.04, low, ha="center", va="top")
        panel.text(place, 1.04, high, ha="center", va="bottom")
    panel.set(ylim=(-0.15, 1.15), title=f"darker is a better {name}")
    panel.tick_params(axis="x", length=0)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _front(objectives: Sequence[str], complete: list[FrozenTrial], front: Sequence[int]) -> Any:
    """The first two objectives; a trial is on the front when no other is better in all of them."""
    figure, (panel,) = _figure(width=5.5)
    best = sorted((t.values[0], t.values[1]) for t in complete if t.number in front)
    panel.plot(*zip(*best, strict=True), "-", color=ORANGE, label="Pareto front") if best else None
    _dots(panel, [t.values[0] for t in complete], np.array([t.values[1] for t in complete]), complete)
    for index, number in enumerate(front):
        trial = next(t for t in complete if t.number == number)
        panel.annotate(str(index), trial.values[:2], xytext=(5, 5), textcoords="offset points", color=ORANGE)
    panel.set(xlabel=objectives[0], ylabel=objectives[1])
    panel.legend(frameon=False)
    return figure


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def _svg(figure: Any, title: str, hover: Mapping[int, str]) -> str:
    """A figure as an SVG element whose trials say on hover what they are."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # ids that no other picture has
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]

    def told(found: re.Match[str]) -> str:
        return f'<g class="trial"><title>{escape(hover.get(int(found[1]), f"trial {found[1]}"))}</title>'

    text = re.sub(r'<g id="trial-(\d+)">', told, text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace("<svg", '<svg role="img"', 1)
