"""The HTML report of a posterior: a single page that loads nothing from the network."""

import base64
import hashlib
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from rich.progress import track

from ltm_pyro.analysis.posterior import TEXT, Posterior
from ltm_pyro.analysis.probes import neighbours
from ltm_pyro.analysis.section import Point, ReportInputs
from ltm_pyro.analysis.sections import SECTIONS, sections, sequence_card
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.pareto import TRUSTED
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write, writing

TOP = 5  # sequences listed per thought
ENDS = 2  # texts at either end of a thought's main direction
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
        {
            "title": title,
            "section": section,
            "pictures": [_picture(ax) for ax in section.pictures],
            "points": _on_the_page(section.points),
            "kinds": {point.kind: point.color for point in sorted(section.points, key=lambda point: point.kind)},
        }
        for title, section in shown
    ]
    cards = [sequence_card(posterior, sequence) for sequence in range(min(posterior.size, MOST_CARDS))]
    for card in cards:
        card["neighbours"] = neighbours(posterior, card["index"], 3)
    kl_NLK = posterior.stats["kl_by_thought"].values if "kl_by_thought" in posterior.stats else None
    environment = Environment(
        loader=PackageLoader("ltm_pyro.analysis", "."), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    script = files("ltm_pyro.analysis").joinpath("report.js").read_text("utf-8")
    return environment.get_template("report.html.j2").render(
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        trusted=TRUSTED,
        sections=made,
        cards=cards,
        thoughts=[] if kl_NLK is None else _top_sequences(kl_NLK[: len(cards)], posterior),
        most_kl=1.0 if kl_NLK is None else float(kl_NLK.max()) or 1.0,
        attrs=posterior.attrs,
        size=posterior.size,
        tokens=posterior.tokens,
        figures=_headline_figures(posterior),
    )


def _headline_figures(posterior: Posterior) -> dict[str, str]:
    """The figures at the top of the page."""
    stats = posterior.stats
    found: dict[str, str] = {}
    if "elbo" in stats:
        there_N = np.all([np.isfinite(stats[name].values) for name in ("elbo", "iwae", "kl")], 0)
        tokens_N = (posterior.group(TEXT)["tokens"] >= 0).sum("token").values
        kept, tokens = stats.isel(sequence=there_N), int(tokens_N[there_N].sum())
        found["ELBO, nats per token"] = f"{float(kept['elbo'].sum()) / max(tokens, 1):.3f}"
        found["importance-weighted bound, nats per token"] = f"{float(kept['iwae'].sum()) / max(tokens, 1):.3f}"
        found["KL, nats per sequence"] = f"{float(kept['kl'].mean()):.2f}"
        if missing := int((~there_N).sum()):
            found["sequences without a finite figure, left out"] = f"{missing} of {posterior.size}"
    if "pareto_k" in stats:
        found[f"sequences with k-hat ≤ {TRUSTED}"] = f"{int((stats['pareto_k'] <= TRUSTED).sum())} of {posterior.size}"
    if "r_hat" in stats:
        found["largest R-hat"] = f"{float(stats['r_hat'].max(skipna=False)):.3f}"
        found["smallest effective sample size"] = f"{float(stats['ess'].min()):.0f}"
    return found


def _top_sequences(kl_NLK: np.ndarray, posterior: Posterior) -> list[dict[str, Any]]:
    """Every thought: its average KL, the sequences with the largest KL, and those at the ends of its main direction."""
    size, layers, thoughts = kl_NLK.shape
    mean_NLKD, texts = posterior.stats["mean"].values[:size], posterior.texts
    found = []
    for layer, thought in np.ndindex(layers, thoughts):
        centered_ND = mean_NLKD[:, layer, thought] - mean_NLKD[:, layer, thought].mean(0)
        left, singular, _ = np.linalg.svd(centered_ND, full_matrices=False)
        order = left[:, 0].argsort(kind="stable").tolist()
        kl_N = kl_NLK[:, layer, thought]
        found.append(
            {
                "layer": layer + 1,
                "thought": thought + 1,
                "mean": float(kl_N.mean()),
                "top": [(int(i), float(kl_N[i])) for i in (-kl_N).argsort()[:TOP]],
                "share": float(singular[0] ** 2 / ((singular**2).sum() or 1.0)),
                "ends": [[(i, texts[i][:60]) for i in end] for end in (order[:ENDS], order[::-1][:ENDS])],
            }
        )
    return found


def _on_the_page(points: tuple[Point, ...]) -> list[Point]:
    """The points of a map in a square of 600 with a margin; the y axis of a page points down."""
    if not points:
        return []
    place = np.array([(point.x, point.y) for point in points])
    low, span = place.min(0), np.maximum(np.ptp(place, axis=0), 1e-12)
    scaled = 20 + 560 * (place - low) / span
    return [
        point._replace(x=round(float(x), 1), y=round(600 - float(y), 1))
        for point, (x, y) in zip(points, scaled, strict=True)
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
