"""A Latent-Thought model of one kind of text beside its autoregressive baseline, at equal training FLOPs.

The corpus is English text that comes with every CPython, so nothing is downloaded: `python -m ltm_pyro.studies.prose`.
A short window sees nearly all that helps there; `ltm_pyro.studies.quickstart` has text where it does not.
"""

import argparse
import ast
import csv
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ltm_pyro.data import PackedDataset
from ltm_pyro.evaluation.documents import compare, document_scores
from ltm_pyro.evaluation.evaluate import coarse_block, evaluate_run
from ltm_pyro.inference.estimators import DEFAULT, ESTIMATORS
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.configure import as_options, recipe_file
from ltm_pyro.studies.quickstart import pack_once
from ltm_pyro.text.generation import generate
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.run_directory import read_checkpoint
from ltm_pyro.training.train import train
from ltm_pyro.utils.as_json import finite
from ltm_pyro.utils.malloc import keep_freed_memory

PROMPT = "Return a list of"
FIGURES = (*DEFAULT, *GAIN, "autoregressive", "unigram")  # nats per held-out token
GAIN_SAMPLES = 64  # enough for `causal_prior` to settle
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def corpus() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference's topics and of every standard-library module's docstrings."""
    from pydoc_data.topics import topics

    yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "test", "tests", "pydoc_data"} & set(path.relative_to(library).parts):
            text = "\n\n".join(_docstrings(path))
            if text:
                yield f"module {path.relative_to(library)}", text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # deliberately broken files, such as those of lib2to3
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def prepare(out: Path) -> Path:
    """Extracts and packs the corpus once; returns the packed directory."""
    rows = ({"id": name, "text": text} for name, text in corpus())
    return pack_once(out, rows, tokenizer="bpe:1024", seq_len=256, val_fraction=0.04)


class Trained(NamedTuple):
    """A finished training and how long it took."""

    run: Run
    path: Path
    seconds: float


def train_prose(out: Path, packed: Path, *options: str) -> Trained:
    """One training by the recipe for prose and further options."""
    places = ("--run", str(out), "--data.directory", str(packed), "--force")
    start = time.monotonic()
    path = train(read_recipe(["--config", recipe_file("prose.yaml"), *places, *options]))
    return Trained(load_run(path), path, time.monotonic() - start)


def precision() -> str:
    """bfloat16 if the processor multiplies it in hardware, which is about twice as fast here; else float32."""
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def unigram(packed: Path) -> float:
    """Nats per held-out token under the training tokens' frequencies, each counted once more than seen."""
    training, held_out = (_tokens(PackedDataset.open(packed, split)) for split in ("train", "val"))
    vocabulary = PackedDataset.open(packed, "val").manifest.vocabulary
    counts = np.bincount(training, minlength=vocabulary) + 1
    return float(-np.log(counts / counts.sum())[held_out].mean())


def _tokens(dataset: PackedDataset) -> np.ndarray:
    return np.concatenate([row.tokens_T for row in dataset])


def summarise(packed: Path, latent_thought: Trained, autoregressive: Trained) -> dict[str, Any]:
    """Every figure of ``summary.json``; nats per token unless the name says otherwise."""
    run = latent_thought.run
    found = evaluate_run(run, estimators=(*DEFAULT, *GAIN), samples=GAIN_SAMPLES, block=coarse_block(run))
    scores, gain = found.estimates, found.predictive_gain
    assert gain is not None
    figures = {name: score.nats_per_token for name, score in scores.items()}
    speeds = [float(x) for row in metrics(latent_thought.path) if (x := row["train/tokens_per_second"])]
    baseline = evaluate_run(autoregressive.run, estimators=["bound"])
    ours, theirs = ([x.as_dict() for x in document_scores(scored)] for scored in (found, baseline))
    above = compare(ours, theirs)
    return {
        **figures,
        "autoregressive": baseline.estimates["bound"].nats_per_token,
        "above_autoregressive": above.value,
        "above_autoregressive_stderr": above.stderr,
        "unigram": unigram(packed),
        "predictive_gain": gain.nats_per_token,
        "predictive_gain_stderr": gain.stderr_nats_per_token,
        "bound_stderr": scores["bound"].stderr_nats_per_token,
        "documents": found.documents,
        "tokens": found.tokens,
        "tokens_per_second": float(np.median(speeds)),
        "train_seconds": latent_thought.seconds,
        "parameters": sum(p.numel() for p in latent_thought.run.model.parameters()),
        "samples": generate(latent_thought.run, [""] * 3, SAMPLING),
        "continuation": PROMPT + generate(latent_thought.run, PROMPT, SAMPLING)[0],
    }


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plot_training(runs: dict[str, Path], unigram: float, path: Path) -> None:
    """Held-out nats per token over seconds of training, one curve a run, and the unigram's as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        rows = [(float(r["seconds"]), float(r["val/bound"])) for r in metrics(run) if r["val/bound"]]
        axes.plot(*zip(*rows, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(unigram, color="grey", linestyle=":", label="unigram")
    axes.set(xlabel="seconds of training", ylabel="nats per held-out token", title="The bound while training")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The table and the samples."""
    table = Table("nats per held-out token", "", title="Prose")
    for name in FIGURES:
        note = "  (not a bound)" if name in ESTIMATORS and not ESTIMATORS[name].is_bound else ""
        table.add_row(name.replace("_", " ") + note, f"{summary[name]:.3f}")
    above = f"{summary['above_autoregressive']:+.3f} ± {summary['above_autoregressive_stderr']:.3f}"
    table.add_row("bound - autoregressive", above)
    gain = f"{summary['predictive_gain']:.3f} ± {summary['predictive_gain_stderr']:.3f}"
    table.add_row("predictive gain (causal prior - causal)", gain)
    console.print(table)
    texts = [("from the prior", text) for text in summary["samples"]]
    for title, text in (*texts, ("after a prompt", summary["continuation"])):
        console.print(Panel(Text(text.strip()), title=title, title_align="left"))


def main() -> None:
    """Packs, trains both models, scores them on held-out documents, and writes summary and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/prose"), help="where everything goes")
    options, given = parser.parse_known_args()
    keep_freed_memory()
    further = ["--trainer.precision", precision(), *given]
    console, out = Console(), options.out
    packed = prepare(out)
    about = "Training the Latent-Thought model, then its autoregressive baseline, for the same FLOPs each."
    console.print(about, soft_wrap=True)
    latent_thought = train_prose(out, packed, *further)
    spent = read_checkpoint(latent_thought.path)["state_dict"]["flops"].item()
    baseline = ar_baseline() | {"trainer.max_steps": -1, "model.max_flops": spent}
    autoregressive = train_prose(out / "autoregressive", packed, *as_options(baseline), *further)
    console.print(f"Scoring both on held-out documents: {', '.join(DEFAULT)}.", soft_wrap=True)
    summary = summarise(packed, latent_thought, autoregressive)
    (out / "summary.json").write_text(json.dumps(finite(summary), indent=2, ensure_ascii=False) + "\n", "utf-8")
    runs = {"Latent-Thought": latent_thought.path, "autoregressive": autoregressive.path}
    plot_training(runs, summary["unigram"], out / "training.png")
    print_summary(summary, console)
    console.print(f"Written: {out}/summary.json, {out}/training.png. Next: ltm evaluate {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
