"""A report one can read: a single page of HTML that needs no network, at a desk or on a phone."""

import base64
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from rich.progress import track

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.probes import neighbours
from ltm_pyro.analysis.sections import SECTIONS, ReportInputs, card, sections
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write, writing

TOP = 5
MOST_CARDS = 1000  # sequences shown one by one: keeps the page under 10 MB


def report(of: ReportInputs) -> str:
    """The page; sections that lack something say what."""
    _check(of)
    posterior = of.posterior
    made = [
        {"title": title, "section": section, "pictures": [_picture(ax) for ax in section.pictures]}
        for title, section in _shown(sections(of))
    ]
    cards = [card(posterior, sequence) for sequence in range(min(posterior.size, MOST_CARDS))]
    for one in cards:
        one["neighbours"] = neighbours(posterior, one["index"], 3)
    kl_NLK = posterior.stats["kl_by_thought"].values if "kl_by_thought" in posterior.stats else None
    environment = Environment(
        loader=PackageLoader("ltm_pyro.analysis", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        sections=made,
        cards=cards,
        thoughts=[] if kl_NLK is None else _thoughts(kl_NLK[: len(cards)]),
        most_kl=1.0 if kl_NLK is None else float(kl_NLK.max()) or 1.0,
        attrs=posterior.attrs,
        size=posterior.size,
        tokens=posterior.tokens,
        figures=_figures(posterior),
    )


def _figures(posterior: Posterior) -> dict[str, str]:
    """What a reader wants to know first."""
    stats, tokens = posterior.stats, posterior.tokens
    found: dict[str, str] = {}
    if "elbo" in stats:
        found["ELBO, nats per token"] = f"{float(stats['elbo'].sum()) / tokens:.3f}"
        found["importance-weighted bound, nats per token"] = f"{float(stats['iwae'].sum()) / tokens:.3f}"
        found["KL, nats per sequence"] = f"{float(stats['kl'].mean()):.2f}"
    if "pareto_k" in stats:
        found[f"sequences with k-hat ≤ {TRUSTED}"] = f"{int((stats['pareto_k'] <= TRUSTED).sum())} of {posterior.size}"
    if "r_hat" in stats:
        found["largest R-hat"] = f"{float(stats['r_hat'].max()):.3f}"
        found["smallest effective sample size"] = f"{float(stats['ess'].min()):.0f}"
    return found


def _shown(made: Iterable[Any]) -> Iterable[Any]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(made, "writing", total=len(SECTIONS), console=console, transient=True, disable=hidden)


def _thoughts(kl_NLK: np.ndarray) -> list[dict[str, Any]]:
    """Every thought with the sequences that pay most KL for it."""
    _, layers, thoughts = kl_NLK.shape
    places = ((layer, thought) for layer in range(layers) for thought in range(thoughts))
    return [
        {
            "layer": layer + 1,
            "thought": thought + 1,
            "mean": float(kl_NLK[:, layer, thought].mean()),
            "top": [(int(i), float(kl_NLK[i, layer, thought])) for i in (-kl_NLK[:, layer, thought]).argsort()[:TOP]],
        }
        for layer, thought in places
    ]


class Picture(NamedTuple):
    """An SVG as a data URI; letters are drawn, so that no font is needed."""

    uri: str
    wide: bool


def _picture(ax: Axes) -> Picture:
    stream = BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(stream, format="svg", metadata={"Date": None})
    uri = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(uri, figure.get_figwidth() > 6)


def _check(of: ReportInputs) -> None:
    """Refuses a run of other thoughts than the posterior's."""
    if of.run is None:
        return
    own, theirs = tuple(of.posterior.z.shape[3:]), tuple(of.run.model.decoder.thought_shape)
    if own != theirs:
        raise UsageError(
            f"The posterior's thoughts are {own} (layers, thoughts, width), but the run's are {theirs}: "
            f"give the run it came from."
        )


def write_report(of: ReportInputs, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    page = report(of)
    with writing(path), atomic_write(Path(path)) as new:
        new.write_text(page, "utf-8")
