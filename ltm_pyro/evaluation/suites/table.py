"""The evaluation table: every suite's parts for a run and its baseline, kept as they are finished."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.suites import generation, gsm8k, multilingual, reconstruction, zero_shot
from ltm_pyro.evaluation.suites.suite import Options, Part, Suite
from ltm_pyro.runs.load import WEIGHTS, is_export, load_run
from ltm_pyro.training.run_directory import checkpoint_path
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write, writing

SUITES = {
    "zero-shot": Suite(
        zero_shot.parts,
        "perplexity of texts the run was not trained on; `bound` where nothing else is said",
        (
            "perplexity",
            "nats_per_token",
            "stderr",
            "iwae",
            "thinking_gain",
            "thinking_gain_stderr",
            "accuracy",
            "tokens",
        ),
    ),
    "multilingual": Suite(
        multilingual.parts,
        "bits per byte of every language file, and what thinking is worth in bits per byte",
        ("bits_per_byte", "stderr", "iwae", "thinking_gain", "thinking_gain_stderr", "bytes_per_token", "tokens"),
    ),
    "gsm8k": Suite(
        gsm8k.parts,
        "the share of questions solved by k answers, with its 95 % interval",
        (
            "pass@1",
            "pass@1_low",
            "pass@1_high",
            "pass@5",
            "pass@5_low",
            "pass@5_high",
            "shots",
            "questions",
            "left_out",
        ),
    ),
    "reconstruction": Suite(
        reconstruction.parts,
        "the share of held-out tokens that are the likeliest given their past and the thoughts of layers 1 to l",
        ("without_thoughts", "accuracy", "stderr", "tokens"),
    ),
    "generation": Suite(
        generation.parts,
        "texts written from the prior",
        (
            *("distinct_1", "distinct_2", "distinct_3", "repetition_4", "self_bleu_4", "compression_ratio"),
            *("judged_perplexity", "judged_bits_per_byte", "mauve", "texts"),
        ),
    ),
}
SOURCES = (*zero_shot.DATA, "multilingual", "gsm8k")  # data sets that may be elsewhere
RESULTS, REPORT, PICTURE = "results.json", "report.md", "reconstruction.png"


def evaluate_suites(
    run: str,
    names: Sequence[str],
    options: Options,
    out: Path,
    baseline: str | None = None,
    force: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Every part of the suites ``names`` for ``run`` and ``baseline``, in that order; returns what ``out`` then holds.

    A part that ``out`` has already is not computed again. What is missing in the data is said before anything is
    computed; a part that fails leaves those before it in ``out``.
    """
    for name in names:
        if name not in SUITES:
            raise UsageError(f"Unknown suite '{name}': choose from {', '.join(SUITES)}.")
    plan = [(name, part) for name in dict.fromkeys(names) for part in SUITES[name].parts(options)]
    paths = {"model": run, **({"baseline": baseline} if baseline else {})}
    runs = {column: load_run(path, device) for column, path in paths.items()}
    book = _ResultsFile(out, _settings(paths, options), force)
    console = Console(stderr=True)
    for index, (name, part) in enumerate(plan, 1):
        for column, trained in runs.items():
            if book.has(name, part, column):
                continue
            console.print(f"[{index} of {len(plan)}] {name}, {part.name}: {column}", highlight=False)
            book.keep(name, part, column, part.figures(trained))
    return book.content


def _settings(paths: dict[str, str], options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    digests = {name: hashlib.sha256(_weights(path).read_bytes()).hexdigest() for name, path in paths.items()}
    return json.loads(json.dumps({**asdict(options), **paths, "sha256": digests}, default=str))


def _weights(run: str) -> Path:
    return Path(run) / WEIGHTS if is_export(run) else checkpoint_path(run)


class _ResultsFile:
    """The file of results, written again after every part."""

    def __init__(self, out: Path, settings: dict[str, Any], force: bool) -> None:
        self.out, self.content = out, {"settings": settings, "results": {}}
        file = out / RESULTS
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file, not a folder: choose another --out.")
        if file.exists() and not force:
            self.content = self._read(file, settings)

    @staticmethod
    def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            before = json.loads(file.read_text("utf-8"))
            changed = [key for key in settings if before["settings"].get(key) != settings[key]]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UsageError(
                f"{file} is not what `ltm evaluate` wrote: choose another --out, or add --force."
            ) from None
        if changed:
            raise UsageError(
                f"{file} was written with another `{changed[0]}` ({before['settings'].get(changed[0])}): choose another"
                f" --out, or add --force to begin anew."
            )
        return before

    def has(self, suite: str, part: Part, column: str) -> bool:
        """Whether this has been computed."""
        return column in self.content["results"].get(suite, {}).get(part.name, {})

    def keep(self, suite: str, part: Part, column: str, figures: dict[str, Any]) -> None:
        """Adds one column of one part, and the paper's figures beside it."""
        row = self.content["results"].setdefault(suite, {}).setdefault(part.name, {})
        row[column] = figures
        if part.theirs:
            row["paper"] = dict(part.theirs)
        results = json.dumps(self.content, indent=2, ensure_ascii=False) + "\n"
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name, text in {RESULTS: results, REPORT: markdown(self.content)}.items():
                with atomic_write(self.out / name) as new:
                    new.write_text(text, "utf-8", "backslashreplace")  # a path may be no UTF-8
            if suite == "reconstruction":
                draw(self.content["results"][suite], self.out / PICTURE)


def markdown(content: dict[str, Any]) -> str:
    """One table for each suite: a line for each part and run; the paper's own figures in a column marked as theirs."""
    settings = content["settings"]
    lines = [f"# {settings['model']}", ""]
    lines += [f"Baseline: {settings['baseline']}.", ""] if "baseline" in settings else []
    for name, parts in content["results"].items():
        lines += [
            f"## {name}",
            "",
            f"{SUITES[name].about[0].upper()}{SUITES[name].about[1:]}.",
            "",
            *_table(name, parts),
            "",
            *_missing(parts),
        ]
    return "\n".join(lines)


def _table(suite: str, parts: dict[str, Any]) -> list[str]:
    rows = [(part, column, row[column], row.get("paper", {})) for part, row in parts.items() for column in row]
    rows = [row for row in rows if row[1] != "paper"]
    shown = [name for name in SUITES[suite].shown if any(name in figures for *_, figures, _ in rows)]
    theirs = any(paper for *_, paper in rows)
    head = [
        "",
        "run",
        *(name.replace("_", " ") for name in shown),
        *(["paper's own (theirs: no bound)"] if theirs else []),
    ]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for part, column, figures, paper in rows:
        cells = [part, column, *(_cell(figures.get(name)) for name in shown)]
        cells += ["; ".join(f"{model} {value}" for model, value in paper.items())] if theirs else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _missing(parts: dict[str, Any]) -> list[str]:
    """Why some cells are empty, once for each run."""
    found: dict[tuple[str, str], list[str]] = {}
    for column, figures in (item for row in parts.values() for item in row.items()):
        for name, reason in figures.get("unavailable", {}).items():
            found.setdefault((column, reason.partition(";")[0]), []).append(name)  # no suite heeds the way out
    lines = [f"{column}: {', '.join(dict.fromkeys(x))} unavailable, for {why}." for (column, why), x in found.items()]
    return [part for line in lines for part in (line, "")]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def draw(parts: dict[str, Any], file: Path) -> None:
    """Token accuracy by the number of layers that hear their thoughts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the figures are in the JSON; the picture is the extra `plots`
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for column, figures in next(iter(parts.values())).items():
        errors = [error or 0 for error in figures["stderr_by_layer"]]
        curve = [figures[f"accuracy_{layer}"] for layer in range(len(errors))]
        axes.errorbar(range(len(curve)), curve, yerr=errors, marker="o", capsize=3, label=column)
    axes.set(xlabel="layers 1 … l hear their thoughts", ylabel="token accuracy", title="Progressive reconstruction")
    axes.set_xticks(range(len(curve)))
    axes.legend()
    with atomic_write(file) as new:
        figure.savefig(new, dpi=150, format="png")
