"""The HTML report of a posterior: a single page that loads nothing from the network."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from rich.progress import track

from ltm_pyro.analysis.posterior import Posterior
from ltm_pyro.analysis.probes import neighbours
from ltm_pyro.analysis.sections import SECTIONS, ReportInputs, sections, sequence_card
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write, writing

TOP = 5  # sequences listed per thought
MOST_CARDS = 1000  # sequences with an entry of their own; keeps the page under 10 MB


def render_report(inputs: ReportInputs) -> str:
    """The page as HTML; a section whose inputs are missing says which. `UsageError` if the run does not fit."""
    posterior = inputs.posterior
    if inputs.run is not None:
        own, theirs = tuple(posterior.z.shape[3:]), tuple(inputs.run.model.decoder.thought_shape)
        if own != theirs:
            raise UsageError(
                f"The posterior's thoughts are {own} (layers, thoughts, width), but the run's are {theirs}: "
                f"give the run it came from."
            )
    console, total = Console(stderr=True), len(SECTIONS)
    hidden = not console.is_terminal
    shown = track(sections(inputs), "writing", total=total, console=console, transient=True, disable=hidden)
    made = [
        {"title": title, "section": section, "pictures": [_picture(ax) for ax in section.pictures]}
        for title, section in shown
    ]
    cards = [sequence_card(posterior, sequence) for sequence in range(min(posterior.size, MOST_CARDS))]
    for card in cards:
        card["neighbours"] = neighbours(posterior, card["index"], 3)
    kl_NLK = posterior.stats["kl_by_thought"].values if "kl_by_thought" in posterior.stats else None
    environment = Environment(
        loader=PackageLoader("ltm_pyro.analysis", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        sections=made,
        cards=cards,
        thoughts=[] if kl_NLK is None else _top_sequences(kl_NLK[: len(cards)]),
        most_kl=1.0 if kl_NLK is None else float(kl_NLK.max()) or 1.0,
        attrs=posterior.attrs,
        size=posterior.size,
        tokens=posterior.tokens,
        figures=_headline_figures(posterior),
    )


def _headline_figures(posterior: Posterior) -> dict[str, str]:
    """The figures at the top of the page."""
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


def _top_sequences(kl_NLK: np.ndarray) -> list[dict[str, Any]]:
    """Every thought with its average KL and the sequences with the largest KL."""
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
    """An SVG as a data URI; letters are paths, so that the page needs no font."""

    uri: str
    wide: bool


def _picture(ax: Axes) -> Picture:
    stream = BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(stream, format="svg", metadata={"Date": None})
    uri = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(uri, figure.get_figwidth() > 6)


def write_report(inputs: ReportInputs, path: str | Path) -> None:
    """Writes the page, whole or not at all."""
    page = render_report(inputs)
    with writing(path), atomic_write(Path(path)) as temp_path:
        temp_path.write_text(page, "utf-8")
