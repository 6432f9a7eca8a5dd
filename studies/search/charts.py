"""Pictures of a study: Optuna's own where they serve, and how a figure becomes part of a page."""

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from ltm_pyro.contracts import UsageError

Charts = dict[str, Any]  # title to matplotlib figure


@contextmanager
def _pictures() -> Iterator[None]:
    """A backend without windows; Optuna's style and warnings stay inside."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError(
            "A report has pictures, for which matplotlib is needed: pip install ltm-pyro[plots]."
        ) from None
    plt.switch_backend("agg")
    with plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # of the layout, and of axes without a label
        yield
    plt.close("all")


def charts(study: optuna.Study, objectives: tuple[str, ...]) -> dict[str, bytes]:
    """Title to PNG, for every picture that the trials so far allow."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    varied = {name for name in (complete[0].params if complete else {}) if len({t.params[name] for t in complete}) > 1}
    found: dict[str, bytes] = {}
    with _pictures():
        for title, draw in _drawings(study, objectives, len(complete), sorted(varied)):
            found[title] = png(np.ravel(draw())[0].figure)
    return found


def _drawings(
    study: optuna.Study, objectives: tuple[str, ...], trials: int, varied: list[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    from optuna.visualization import matplotlib as plots

    if len(objectives) in (2, 3) and trials:
        yield "pareto front", partial(plots.plot_pareto_front, study, target_names=list(objectives))
    for index, name in enumerate(objectives):
        target: dict[str, Any] = {"target_name": name}
        if len(objectives) > 1:
            target["target"] = partial(_value, index)
        if trials:
            yield f"history of {name}", partial(plots.plot_optimization_history, study, **target)
        if varied:
            yield f"slices of {name}", partial(plots.plot_slice, study, varied, **target)
        if len(varied) > 1 and trials > 3:
            yield f"importance for {name}", partial(plots.plot_param_importances, study, **target)
            yield f"contours of {name}", partial(plots.plot_contour, study, varied, **target)
            yield f"parallel {name}", partial(plots.plot_parallel_coordinate, study, varied, **target)


def _value(index: int, trial: FrozenTrial) -> float:
    return trial.values[index]


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def embedded(image: bytes, title: str) -> str:
    """An HTML image that carries its own bytes."""
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
