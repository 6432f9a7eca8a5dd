"""Who collapses: an encoder against local inference, on the corpus of prose. KL and honest bound over training.

    python benchmarks/bench_collapse.py [--out runs/collapse] [--steps 240] [--figure docs/figures/collapse.png]

Both follow the recipe for prose for equally many slow steps, that is for equally many tokens; only the guide differs.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ltm_pyro.evaluation.evaluate import coarse_block, evaluate_run
from ltm_pyro.inference.scores import GAIN
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.prose import precision, prepare, train_prose

GUIDES = ("MeanField", "Amortized")


def curve(run: Path) -> dict[str, list[float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/bound"]]
    return {
        "step": [float(row["step"]) for row in rows],
        "bound": [float(row["val/bound"]) for row in rows],
        "kl": [float(row["val/kl"]) for row in rows],
    }


def plot_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    names = {"kl": "KL (q || p), nats per token", "bound": "honest bound, nats per token"}
    for axes, key in zip(figure.subplots(1, 2), names, strict=True):
        for guide, found in curves.items():
            axes.plot(found["step"], found[key], marker="o", markersize=3, label=guide)
        axes.set(xlabel="slow steps", title=names[key])
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/collapse.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    packed, curves, figures = prepare(options.out), {}, {}
    budget = ("--trainer.max_steps", str(options.steps))
    checks = ("--trainer.val_check_interval", str(max(1, options.steps // 8)), "--trainer.limit_val_batches", "2")
    for guide in GUIDES:
        words = ("--model.guide", f"ltm_pyro.guides.{guide}", "--data.tokens", "2048", *budget, *checks)
        path = train_prose(options.out / guide, packed, *words, "--trainer.precision", precision()).path
        run = load_run(path)
        found = evaluate_run(run, estimators=["bound", *GAIN], samples=64, limit=32, block=coarse_block(run))
        scores, gain = found.estimates, found.predictive_gain
        assert gain is not None
        curves[guide] = curve(path)
        figures[guide] = {
            "bound": scores["bound"].nats_per_token,
            "stderr": scores["bound"].stderr_nats_per_token,
            "kl": scores["bound"].kl_nats_per_token,
            "predictive_gain": gain.nats_per_token,
            "predictive_gain_stderr": gain.stderr_nats_per_token,
        }
        print(json.dumps({guide: figures[guide]}), flush=True)
    plot_curves(curves, options.figure)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
