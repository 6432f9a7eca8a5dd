"""The recipe cpu-small beside its autoregressive twin at equal training FLOPs: learning curves and honest bounds.

    ltm data pack CORPUS.jsonl --out data/corpus --tokenizer bpe:4096 --seq-len 256
    python benchmarks/bench_cpu_small.py --data data/corpus --texts ptb.valid.txt wikitext2.valid.txt agnews.jsonl

Two trainings of some ten minutes on two cores; one that was cut off goes on. Writes a dated report and a picture to
benchmarks/results/. Without the data it says so. Further arguments go to both trainings.
"""

import argparse
import csv
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

from ltm_pyro.evaluation import evaluate_run
from ltm_pyro.runs import load_run
from ltm_pyro.training.fitting import train
from ltm_pyro.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "studies" / "recipes" / "cpu-small.yaml"
MODELS = {"Latent-Thought": (), "autoregressive": ("--model.decoder.init_args.thoughts", "0")}


def fit(name: str, arguments: argparse.Namespace) -> Path:
    places = ("--run", f"{arguments.out}/{name}", "--data.directory", arguments.data, "--ckpt_path", "last")
    return train(read_recipe(["--config", str(RECIPE), *places, *MODELS[name], *arguments.further]))


def curve(run: Path) -> list[tuple[float, float]]:
    """Held-out nats per token over FLOPs spent: validation rows stand behind the training row of their step."""
    points, spent = [], 0.0
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            spent = float(row["train/flops"] or spent)
            if row["val/bound"]:
                points.append((spent, float(row["val/bound"])))
    return points


def draw(runs: dict[str, Path], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        axes.plot(*zip(*curve(run), strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="training FLOPs", ylabel="bound, nats per held-out token", title="cpu-small at equal FLOPs")
    axes.legend()
    figure.savefig(path, dpi=110)


def table(runs: dict[str, Path], texts: list[str | None], limit: int) -> list[str]:
    lines = ["| text | model | tokens | bound | ± s.e. | iwae | prior | bits per byte |", "|" + " --- |" * 8]
    for text in texts:
        for name, run in runs.items():
            found = evaluate_run(load_run(run), text, ["bound", "iwae", "prior"], 8, limit=limit)
            bound, iwae, prior = found.protocols.values()
            nats = " | ".join(f"{s.nats_per_token:.4f}" for s in (iwae, prior))
            figures = (
                f"{bound.nats_per_token:.4f} | {bound.stderr_nats_per_token:.4f} | {nats} | {bound.bits_per_byte:.3f}"
            )
            lines.append(f"| {Path(text).name if text else 'validation'} | {name} | {found.tokens:,} | {figures} |")
    return lines


def main() -> None:
    """Trains both, scores them on every text, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/corpus", help="packed data, sequences of 256")
    parser.add_argument("--out", default="runs/cpu-small", help="where the runs go")
    parser.add_argument("--texts", nargs="*", default=[], help="further texts to score")
    parser.add_argument("--limit", type=int, default=400, help="sequences of each text to score")
    arguments, arguments.further = parser.parse_known_args(namespace=argparse.Namespace(further=[]))
    if not Path(arguments.data).exists():
        print(f"not run: no packed data at {arguments.data}; pack some with `ltm data pack` and name it with --data")
        return
    runs = {name: fit(name, arguments) for name in MODELS}
    report = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-cpu-small.md"
    report.parent.mkdir(exist_ok=True)
    draw(runs, report.with_suffix(".png"))
    command = shlex.join(["python", "benchmarks/bench_cpu_small.py", *sys.argv[1:]])
    heading = ["# cpu-small beside its autoregressive twin", "", f"`{command}`", ""]
    heading += [f"{platform.machine()}, {os.cpu_count()} cores; nats per token of the honest bound, 8 draws.", ""]
    lines = [*heading, *table(runs, [None, *arguments.texts], arguments.limit), "", f"![curves]({report.stem}.png)", ""]
    report.write_text("\n".join(lines), "utf-8")
    print(report)


if __name__ == "__main__":
    main()
