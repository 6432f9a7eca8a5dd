"""A recipe beside its autoregressive baseline at equal training FLOPs: learning curves and honest bounds.

    ltm data pack CORPUS.jsonl --out data/corpus --tokenizer bpe:4096 --seq-len 256
    python benchmarks/bench_ar_baseline.py --data data/corpus --texts ptb.valid.txt wikitext2.valid.txt agnews.jsonl

On a CPU this is cpu-small, which brings its own budget of FLOPs: two trainings of some ten minutes on two cores. On a
CUDA device it is ltm-small for eight minutes, on sequences of 1,024 tokens, and its baseline for as many FLOPs. An
interrupted training resumes. Writes a dated report and a picture to benchmarks/results/. Without the data it says so.
Further arguments go to both trainings.
"""

import argparse
import csv
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.budget import max_time
from ltm_pyro.studies.configure import Values, as_options
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.run_directory import read_checkpoint
from ltm_pyro.training.train import train
from ltm_pyro.utils.malloc import keep_freed_memory

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "studies" / "recipes"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION, BATCH = ("--trainer.precision", "bf16-mixed"), ("--data.tokens", "65536")
OPTIONS = {  # by device; on CUDA some thousand steps in all
    "cuda": (*PRECISION, *BATCH, "--model.compile", "true", "--trainer.val_check_interval", "100"),
    "cpu": (),
}


def fit(name: str, arguments: argparse.Namespace, settings: Values) -> Path:
    run = Path(arguments.out or f"runs/{arguments.recipe}", name)
    places = ("--run", str(run), "--data.directory", arguments.data, "--ckpt_path", "last")
    words = ["--config", str(RECIPES / f"{arguments.recipe}.yaml"), *places, *as_options(settings)]
    return train(read_recipe([*words, *OPTIONS[DEVICE], *arguments.further]))


def fit_both(arguments: argparse.Namespace) -> dict[str, Path]:
    """By the recipe's own budget, or the first for some minutes and the second for its FLOPs."""
    minutes, baseline = arguments.minutes, ar_baseline()
    latent_thought = fit("latent-thought", arguments, {"trainer.max_time": max_time(60 * minutes)} if minutes else {})
    if minutes:
        baseline["model.max_flops"] = read_checkpoint(latent_thought)["state_dict"]["flops"].item()
    return {"Latent-Thought": latent_thought, "autoregressive": fit("autoregressive", arguments, baseline)}


def curve(run: Path) -> list[tuple[float, float]]:
    """Held-out nats per token over FLOPs spent: validation rows follow the training row of their step."""
    points, spent = [], 0.0
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            spent = float(row["train/flops"] or spent)
            if row["val/bound"]:
                points.append((spent, float(row["val/bound"])))
    return points


def plot_curves(runs: dict[str, Path], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        axes.plot(*zip(*curve(run), strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="training FLOPs", ylabel="bound, nats per held-out token", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)


def table(runs: dict[str, Path], texts: list[str | None], limit: int) -> list[str]:
    lines = ["| text | model | tokens | bound | ± s.e. | iwae | prior | bits per byte |", "|" + " --- |" * 8]
    for text in texts:
        for name, run in runs.items():
            found = evaluate_run(load_run(run, DEVICE), text, ["bound", "iwae", "prior"], 8, limit=limit)
            bound, iwae, prior = found.estimates.values()
            nats = " | ".join(f"{s.nats_per_token:.4f}" for s in (iwae, prior))
            figures = (
                f"{bound.nats_per_token:.4f} | {bound.stderr_nats_per_token:.4f} | {nats} | {bound.bits_per_byte:.3f}"
            )
            lines.append(f"| {Path(text).name if text else 'validation'} | {name} | {found.tokens:,} | {figures} |")
    return lines


def main() -> None:
    """Trains both, scores them on every text, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(x.stem for x in RECIPES.glob("*-*.yaml")), help="what is trained")
    parser.add_argument("--data", default="data/corpus", help="packed data, of the recipe's sequence length")
    parser.add_argument("--out", help="where the runs go; runs/RECIPE when not given")
    parser.add_argument("--minutes", type=int, help="of the first; the second gets its FLOPs")
    parser.add_argument("--texts", nargs="*", default=[], help="further texts to score")
    parser.add_argument("--limit", type=int, default=400, help="sequences of each text to score")
    arguments, arguments.further = parser.parse_known_args(namespace=argparse.Namespace(further=[]))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    if not arguments.recipe and DEVICE == "cuda":
        arguments.recipe, arguments.minutes = "ltm-small", arguments.minutes or 8
    elif not arguments.recipe:
        arguments.recipe = "cpu-small"
        print("ltm-small: not run: no CUDA device")
    if not Path(arguments.data).exists():
        print(f"not run: no packed data at {arguments.data}; pack some with `ltm data pack` and name it with --data")
        return
    keep_freed_memory()  # as every command does
    runs, title = fit_both(arguments), f"{arguments.recipe} at equal FLOPs"
    report = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{arguments.recipe}.md"
    report.parent.mkdir(exist_ok=True)
    plot_curves(runs, title, report.with_suffix(".png"))
    command = shlex.join(["python", "benchmarks/bench_ar_baseline.py", *sys.argv[1:]])
    heading = [f"# {arguments.recipe} beside its autoregressive baseline", "", f"`{command}`", ""]
    heading += [f"{platform.machine()}, {device}; nats per token of the honest bound, 8 draws.", ""]
    lines = [*heading, *table(runs, [None, *arguments.texts], arguments.limit), "", f"![curves]({report.stem}.png)", ""]
    report.write_text("\n".join(lines), "utf-8")
    print(report)


if __name__ == "__main__":
    main()
