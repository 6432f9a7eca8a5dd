"""What `ltm baselines` has found: texts of each model with their figures, and one page of everything."""

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from html import escape
from math import log
from pathlib import Path
from typing import Any

from ltm_pyro.data.encode import encode_prompt
from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites import zero_shot
from ltm_pyro.evaluation.suites.generation import held_out_texts, text_figures
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Options
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.baselines import LTM, MODELS, PATIENCE, Baselines
from ltm_pyro.studies.search.charts import png
from ltm_pyro.studies.search.report import PAGE
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import atomic_write
from ltm_pyro.utils.plotting import CYCLE, MARKERS, plain

HELD_OUT = "held-out text"
JUDGE = "autoregressive-full"  # scores everybody's texts, also its own; its hidden states are MAUVE's features
LENGTH = 128  # tokens of a text at most
SHOWN = 2  # texts of each model on the page
TEXTS, SUITES = "texts.json", "zero-shot.json"  # in a run's folder


def texts_of(baselines: Baselines, name: str, count: int) -> dict[str, Any]:
    """``count`` texts of a model's first training (or held-out ones), with their figures.

    Perplexity under a judge is won by repetition, so the entropy of the words is beside it: −Σ f log f over their
    frequencies f, in nats.
    """
    run = baselines.run(LTM if name == HELD_OUT else name, baselines.seeds[0])
    file = run / (f"held-out-{TEXTS}" if name == HELD_OUT else TEXTS)
    if not file.exists():
        trained = load_run(run)
        others, began = held_out_texts(trained, 2 * count), time.perf_counter()
        if name == HELD_OUT:
            texts, others = others[: len(others) // 2], others[len(others) // 2 :]
        else:
            texts = generate(trained, [""] * count, Sampling(max_new_tokens=min(LENGTH, trained.length)))
        seconds = time.perf_counter() - began
        judge = str(baselines.run(JUDGE, baselines.seeds[0]))
        try:
            figures = text_figures(texts, others[:count], Options(judge=judge, features=judge))
        except UsageError as error:  # nothing is written, or there are too few texts for features
            figures = {"unavailable": str(error)}
        figures |= {"entropy": entropy(trained, texts)}
        if name != HELD_OUT:
            figures["tokens_per_second"] = sum(len(encode_prompt(trained.tokenizer, x)) for x in texts) / seconds
        with atomic_write(file) as new:
            found = finite({"figures": figures, "texts": texts})
            new.write_text(json.dumps(found, ensure_ascii=False), "utf-8", "backslashreplace")
    stored: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return stored


def entropy(run: Run, texts: Sequence[str]) -> float:
    """−Σ f log f of the tokens of all texts together, in nats."""
    counts = Counter(token for text in texts for token in encode_prompt(run.tokenizer, text))
    total = counts.total()
    return -sum(n / total * log(n / total) for n in counts.values())


def suites_of(baselines: Baselines, model: str, options: Options) -> dict[str, dict[str, Any]]:
    """The zero-shot figures of a model's first training by data set; the reason where it has none."""
    run, found = baselines.run(model, baselines.seeds[0]), {}
    file = run / SUITES
    if not file.exists():
        trained = load_run(run)
        for part in zero_shot.parts(options):
            try:
                figures = part.figures(trained)
            except UsageError as error:
                figures = {"unavailable": str(error)}
            found[part.name] = {key: x for key, x in figures.items() if key not in (BY_DOCUMENT, "estimates")}
        with atomic_write(file) as new:
            new.write_text(json.dumps(finite(found), ensure_ascii=False), "utf-8", "backslashreplace")
    stored: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))
    return stored


def summary(baselines: Baselines, texts: int, suites: Options | None = None) -> dict[str, Any]:
    """All figures; whatever is not there yet is trained, scored and written first."""
    rows = [baselines.figures(model, seed) for model in MODELS for seed in baselines.seeds]
    names = [*MODELS, HELD_OUT]
    return {
        "match": baselines.match,
        "budget": baselines.budget,
        "search": {"rates": [*baselines.rates], "share": baselines.share, "patience": PATIENCE},
        "rows": rows,
        "differences": {model: baselines.difference(model) for model in MODELS if model != LTM},
        "verdicts": [baselines.verdict(model) for model in MODELS if model != LTM],
        "texts": {name: texts_of(baselines, name, texts) for name in names} if texts else {},
        "zero_shot": {model: suites_of(baselines, model, suites) for model in MODELS} if suites else {},
    }


def write_page(baselines: Baselines, found: dict[str, Any], file: Path) -> None:
    """Everything on one page that needs nothing else."""
    search = found["search"]
    asked = (
        f"Equal for all: the text, its split, {found['match']} ({found['budget']}), the trunk, and the care: "
        f"{len(search['rates'])} rates tried with {search['share']:g} of the budget each, a training that ends after "
        f"{search['patience']} validations without a better figure, and one look at the test split."
    )
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in found["verdicts"])
    body = [
        f"<p>{escape(asked)}</p>",
        f'<section class="lead">{said}</section>',
        _section("Test split, nats per token", _models(found["rows"]) + _differences(found["differences"])),
        _section("Learning curves", _image(curves(baselines), "Learning curves")),
    ]
    if found["texts"]:
        body.append(_section("Texts written without a prompt", _texts(found["texts"])))
    if found["zero_shot"]:
        body.append(_section("Other texts, zero-shot: bits per byte", _zero_shot(found["zero_shot"])))
    with atomic_write(file) as new:
        page = PAGE.format(title="A Latent-Thought model beside its baselines", body="\n".join(body))
        new.write_text(page, "utf-8", "backslashreplace")


def _image(png: bytes, title: str) -> str:
    """A picture that carries its own bytes, and can be moved sideways where it does not fit."""
    data = base64.b64encode(png).decode()
    return f'<div class="table"><img alt="{title}" src="data:image/png;base64,{data}"></div>'


def curves(baselines: Baselines) -> bytes:
    """The figure on the validation split by FLOPs, by tokens and by seconds, a line for each training."""
    extra("matplotlib", "plots", "A page with pictures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 3, sharey=True), ("flops", "tokens", "seconds"), strict=True):
        plain(panel, xlabel=axis)
        for model, colour, marker in zip(MODELS, CYCLE, MARKERS, strict=False):
            for seed in baselines.seeds:
                points = baselines.curve(model, seed)
                x, y = ([point[key] for point in points] for key in (axis, "bound"))
                label = model if seed == baselines.seeds[0] else None
                panel.plot(x, y, color=colour, marker=marker, markersize=3, label=label)
    figure.axes[0].set_ylabel("nats per token")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return png(figure)


def _models(rows: list[dict[str, Any]]) -> str:
    head = ["model", "seed", "rate", "nats/token", "± s.e.", "of draws", "iwae", "what it is", "bits/byte"]
    cells = [
        [
            *(row["model"], str(row["seed"]), f"x {row['rate']:g}", _number(row["nats_per_token"])),
            *(_number(row["stderr"]), _number(row["monte_carlo_stderr"]), _number(row["iwae"])),
            *("exact" if row["exact"] else "a bound", _number(row["bits_per_byte"]), f"{row['parameters']:,}"),
            *(f"{row['flops']:.3g}", f"{row['steps']:,}", "" if row["seconds"] is None else f"{row['seconds']:.0f}"),
        ]
        for row in rows
    ]
    return _table([*head, "parameters", "FLOPs", "steps", "seconds"], cells)


def _differences(found: dict[str, dict[str, Any] | None]) -> str:
    head = [f"{LTM} above", "nats/token", "± s.e.", "over documents", "over seeds"]
    names = ("nats_per_token", "stderr", "over_documents", "over_seeds")
    return _table(head, [[model, *(_number((x or {}).get(name)) for name in names)] for model, x in found.items()])


def _texts(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(key for each in found.values() for key in each["figures"] if key != "unavailable"))
    cells = [[name, *(_number(each["figures"].get(key)) for key in names)] for name, each in found.items()]
    said = "".join(
        f"<h3>{escape(name)}</h3>"
        + "".join(f"<blockquote>{escape(x[:600])}</blockquote>" for x in each["texts"][:SHOWN])
        for name, each in found.items()
    )
    about = (
        f"Perplexity and MAUVE's features are those of {JUDGE}, which was trained on the same text. A low perplexity "
        f"is also what repetition gives: read it beside the entropy, and both beside those of {HELD_OUT}."
    )
    return f'<p class="soft">{escape(about)}</p>{_table(["", *names], cells)}{said}'


def _zero_shot(found: dict[str, dict[str, Any]]) -> str:
    sets = list(dict.fromkeys(name for each in found.values() for name in each))
    cells = [
        [model, *(_number(each.get(name, {}).get("bits_per_byte")) for name in sets)] for model, each in found.items()
    ]
    return _table(["", *sets], cells)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(x)}</th>" for x in head)]
    lines += ["".join(f"<td>{escape(x)}</td>" for x in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{body}</table></div>'


def _number(x: Any) -> str:
    return "" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if isinstance(x, float) else str(x)
