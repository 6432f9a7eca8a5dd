"""The evaluation table: every part of every suite for a run and its baseline, stored as soon as it is computed."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ltm_pyro.errors import UsageError
from ltm_pyro.evaluation.documents import compare
from ltm_pyro.evaluation.suites import generation, gsm8k, multilingual, reasoning, reconstruction, zero_shot
from ltm_pyro.evaluation.suites.suite import BY_DOCUMENT, Options, Part, Suite
from ltm_pyro.runs.load import is_export, load_run
from ltm_pyro.training.run_directory import WEIGHTS, checkpoint_path
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write, check_folder, lock_folder, new_folder, writing

SUITES = {
    "zero-shot": Suite(
        zero_shot.parts,
        "perplexity of texts the run was not trained on, by the estimator `bound` if no other is named",
        (
            "perplexity",
            "nats_per_token",
            "stderr",
            "iwae",
            "predictive_gain",
            "predictive_gain_stderr",
            "shorter_than_a_block",
            "accuracy",
            "tokens",
        ),
    ),
    "multilingual": Suite(
        multilingual.parts,
        "bits per byte and predictive gain in bits per byte, by language",
        (
            "bits_per_byte",
            "stderr",
            "iwae",
            "predictive_gain",
            "predictive_gain_stderr",
            "shorter_than_a_block",
            "bytes_per_token",
            "tokens",
        ),
    ),
    "gsm8k": Suite(
        gsm8k.parts,
        "the share of questions that at least one of k answers solves, with its 95 % interval",
        (
            *(f"pass@{k}_{way}{end}" for way in gsm8k.EXTRACT for k in (1, 5) for end in ("", "_low", "_high")),
            "shots",
            "questions",
            "left_out",
        ),
    ),
    "reasoning": Suite(
        reasoning.parts,
        "the share of problems answered rightly on test, by ways that were chosen on val at equal FLOPs",
        (
            *("one_draft", "greedy", "majority", "best_of_N", "rethinking", "rethinking_greedily"),
            *("rethinking_with_votes", "harder_one_draft", "harder_majority", "harder_rethinking_with_votes"),
            *("questions", "harder_questions"),
        ),
    ),
    "reconstruction": Suite(
        reconstruction.parts,
        "the share of held-out tokens that are the most likely ones given their past and the thoughts of layers 1 to l",
        ("without_thoughts", "accuracy", "stderr", "tokens"),
    ),
    "generation": Suite(
        generation.parts,
        "texts generated with thoughts drawn from the prior",
        (
            *("distinct_1", "distinct_2", "distinct_3", "repetition_4", "self_bleu_4", "compression_ratio"),
            *("judged_perplexity", "judged_bits_per_byte", "mauve", "texts"),
        ),
    ),
}
UNITS = {"zero-shot": ("tokens", "nats_per_token"), "multilingual": ("bytes", "bits_per_byte")}  # that are compared
SOURCES = (*zero_shot.DATA, "multilingual", "gsm8k", "reasoning")  # data sets that --source accepts
RESULTS, REPORT, DOCUMENTS = "results.json", "report.md", "documents"


def evaluate_suites(
    run: str,
    names: Sequence[str],
    options: Options,
    out: Path,
    baseline: str | None = None,
    force: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Computes every part of the suites ``names`` for ``run`` and ``baseline``; returns what is in ``results.json``.

    Parts that are in ``out`` already are not computed again. Missing data are refused before anything is computed. If a
    part fails, the parts before it stay in ``out``.
    """
    for name in names:
        if name not in SUITES:
            raise UsageError(f"Unknown suite '{name}': choose from {', '.join(SUITES)}.")
    plan = [(name, part) for name in dict.fromkeys(names) for part in SUITES[name].parts(options)]
    counts = Counter((name, part.name) for name, part in plan)
    if twice := [f"{part!r} of the suite {name}" for (name, part), n in counts.items() if n > 1]:
        raise UsageError(f"Two data sets would be the same row, {twice[0]}: give each another name, or leave one out.")
    paths = {"model": run, **({"baseline": baseline} if baseline else {})}
    runs = {column: load_run(path, device, options.trust) for column, path in paths.items()}
    weights = {name: Path(x) / WEIGHTS if is_export(x) else checkpoint_path(x) for name, x in paths.items()}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items()}
    no_figure = ("trust", "workers")  # depends on these
    asked = {name: x for name, x in asdict(options).items() if name not in no_figure}
    settings = json.loads(json.dumps({**asked, **paths, "sha256": digests}, default=str))
    console = Console(stderr=True)
    results = _ResultsFile(out, settings, force)
    busy = f"Another process writes to {out} right now: wait for it, or choose another --out."
    # beside it, because a folder that was not there is removed again if nothing can be written
    with lock_folder(out.parent / f".{out.name}.lock", busy, "--out"):
        results.read()
        for index, (name, part) in enumerate(plan, 1):
            for column, trained in runs.items():
                if results.has(name, part, column):
                    continue
                console.print(f"[{index} of {len(plan)}] {name}, {part.name}: {column}", highlight=False)
                results.add(name, part, column, part.figures(trained))
    return results.content


class _ResultsFile:
    """``results.json`` and the report made from it, written again after every part."""

    def __init__(self, out: Path, settings: dict[str, Any], force: bool) -> None:
        self.out, self._force, self.content = out, force, {"settings": settings, "results": {}}
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file, not a folder: choose another --out.")
        check_folder(out, "--out")

    def read(self) -> None:
        """Takes what is there already; `UsageError` if it is of other settings and not to be replaced."""
        file = self.out / RESULTS
        if file.exists() and not self._force:
            self.content = self._read(file, self.content["settings"])

    @staticmethod
    def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            before = json.loads(file.read_text("utf-8"))
            changed = [key for key in settings if before["settings"].get(key) != settings[key]]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UsageError(
                f"{file} is not what `ltm evaluate` wrote: choose another --out, or add --force to replace it."
            ) from None
        if changed:
            raise UsageError(
                f"{file} was written with another `{changed[0]}` ({before['settings'].get(changed[0])}): choose another"
                f" --out, or add --force to start again."
            )
        return before

    def has(self, suite: str, part: Part, column: str) -> bool:
        """Whether this part has been computed for this column."""
        return column in self.content["results"].get(suite, {}).get(part.name, {})

    def _documents(self, suite: str, part: Part, column: str) -> Path:
        return self.out / DOCUMENTS / f"{suite}.{part.name}.{column}.jsonl".replace(" ", "-").replace("/", "-")

    def add(self, suite: str, part: Part, column: str, figures: dict[str, Any]) -> None:
        """Stores one column of one part, and the paper's figures for it; writes the files.

        What is known of each document is in a file of its own, a line for each.
        """
        row = self.content["results"].setdefault(suite, {}).setdefault(part.name, {})
        documents = figures.get(BY_DOCUMENT)
        row[column] = {name: x for name, x in figures.items() if name != BY_DOCUMENT}
        with writing(self.out), new_folder(self.out):
            if documents:
                (self.out / DOCUMENTS).mkdir(exist_ok=True)
                lines = (json.dumps(finite(found), ensure_ascii=False) + "\n" for found in documents)
                with atomic_write(self._documents(suite, part, column)) as new:
                    new.write_text("".join(lines), "utf-8", "backslashreplace")
            else:  # a file of other settings, which --force replaces
                self._documents(suite, part, column).unlink(missing_ok=True)
            names = ("model", "baseline")
            files = [self._documents(suite, part, name) for name in names]
            if suite in UNITS and all(name in row and file.exists() for name, file in zip(names, files, strict=True)):
                row["model - baseline"] = _difference(files, *UNITS[suite])
            if part.paper:
                row["paper"] = dict(part.paper)
            results = json.dumps(finite(self.content), indent=2, ensure_ascii=False) + "\n"
            for name, text in {RESULTS: results, REPORT: markdown(self.content)}.items():
                with atomic_write(self.out / name) as new:
                    new.write_text(text, "utf-8", "backslashreplace")  # a path may be no UTF-8
            if plot := PICTURES.get(suite):
                plot(self.content["results"][suite], self.out / f"{suite}.png")


def _difference(files: Sequence[Path], unit: str, figure: str) -> dict[str, Any]:
    """The model's bound less the baseline's, paired by document; only the reason if they cannot be compared."""
    lines = (file.read_text("utf-8").split("\n") for file in files)  # a string may have other ends of a line in it
    first, second = ([json.loads(line) for line in found if line] for found in lines)
    try:
        found = compare(first, second, unit=unit)
    except UsageError as error:
        reason = str(error)
        return {"unavailable": {figure.replace("_", " "): reason[0].lower() + reason[1:]}}
    return {figure: found.value, "stderr": found.stderr}


def markdown(content: dict[str, Any]) -> str:
    """The report: one table per suite, one row per part and run, the paper's figures in a column of their own."""
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
            *_unavailable(parts),
        ]
    return "\n".join(lines)


def _table(suite: str, parts: dict[str, Any]) -> list[str]:
    rows = [(part, column, row[column], row.get("paper", {})) for part, row in parts.items() for column in row]
    rows = [row for row in rows if row[1] != "paper"]
    shown = [name for name in SUITES[suite].columns if any(name in figures for *_, figures, _ in rows)]
    in_paper = any(paper for *_, paper in rows)
    head = [
        "",
        "run",
        *(name.replace("_", " ") for name in shown),
        *(["paper (not a bound)"] if in_paper else []),
    ]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for part, column, figures, paper in rows:
        cells = [part, column, *(_cell(figures.get(name)) for name in shown)]
        cells += ["; ".join(f"{model} {value}" for model, value in paper.items())] if in_paper else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _unavailable(parts: dict[str, Any]) -> list[str]:
    """One sentence per run and reason why cells are empty, or figures are not what their column says."""
    found: dict[tuple[str, str], list[str]] = {}
    notes: dict[str, None] = {}
    for part, column, figures in ((part, *item) for part, row in parts.items() for item in row.items()):
        if figures.get("no_bound"):
            notes[f"{column}: no figure of {part} is a bound, because {figures['no_bound']}."] = None
        if figures.get("excluded"):
            notes[f"{column}: {part} leaves out {len(figures['excluded'])} sequences without a finite figure."] = None
        for name, reason in figures.get("unavailable", {}).items():
            why = reason.partition(";")[0]  # the advice after it is for evaluations without suites
            found.setdefault((column, why), []).append(name)
    lines = [f"{column}: {', '.join(dict.fromkeys(x))} unavailable, because {w}." for (column, w), x in found.items()]
    return [part for line in (*lines, *notes) for part in (line, "")]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plot_reconstruction(parts: dict[str, Any], file: Path) -> None:
    """Plots token accuracy by the number of layers that attend to their thoughts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # the figures are in results.json; the picture needs the extra `plots`
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for column, figures in next(iter(parts.values())).items():
        errors = [error or 0 for error in figures["stderr_by_layer"]]
        curve = [figures[f"accuracy_{layer}"] for layer in range(len(errors))]
        axes.errorbar(range(len(curve)), curve, yerr=errors, marker="o", capsize=3, label=column)
    axes.set(xlabel="layers 1 … l attend to thoughts", ylabel="token accuracy", title="Progressive reconstruction")
    axes.set_xticks(range(len(curve)))
    axes.legend()
    with atomic_write(file) as new:
        figure.savefig(new, dpi=150, format="png")


def plot_reasoning(parts: dict[str, Any], file: Path) -> None:
    """Plots accuracy over the FLOPs of a question, a panel for each task, run and split that is reported."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # as above
    rows = [(part, column, found["curves"]) for part, row in parts.items() for column, found in row.items()]
    figure = Figure(figsize=(11, 3.5 * len(rows)), layout="constrained")
    for axes_of_row, (part, column, curves) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        for axes, split in zip(axes_of_row, reasoning.REPORTED, strict=True):
            for name, points in curves.get(split, {}).items():
                axes.plot([x["flops"] for x in points], [x["accuracy"] for x in points], marker="o", label=name)
            axes.set(xlabel="FLOPs of a question", ylabel="answered rightly", title=f"{part}, {split}: {column}")
            axes.set(xscale="log", ylim=(-0.02, 1.02))
    axes_of_row[0].legend(fontsize="small")
    with atomic_write(file) as new:
        figure.savefig(new, dpi=150, format="png")


PICTURES = {"reconstruction": plot_reconstruction, "reasoning": plot_reasoning}
