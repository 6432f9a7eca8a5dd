"""How efficient inference is: bounds on one −log p(x) with and without q, by the passes through the decoder they cost.

    python examples/inference_efficiency.py runs/prose --out runs/inference-efficiency

`prior_iwae` draws z from the prior, `iwae` from a q that some fast steps were spent on; both fall towards the evidence.
What is worth more at the same cost is read off the picture. Prints a table and writes ``inference_efficiency.json`` and
``inference_efficiency.png``.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.inference.scores import Point
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run

FAST_STEPS, SAMPLES = (4, 16, 64), (1, 4, 16, 64)
WITHOUT = "prior_iwae"
Curves = dict[str, dict[int, Point]]  # by name and samples


def measure(run: Run, limit: int | None) -> Curves:
    """`prior_iwae`, and `iwae` after some numbers of fast steps."""
    without = evaluate_run(run, estimators=[WITHOUT], samples=(*SAMPLES, 256), limit=limit)
    curves = {WITHOUT: without.estimates[WITHOUT].curve}
    for steps in FAST_STEPS:
        found = evaluate_run(run, estimators=["iwae"], samples=SAMPLES, fast_steps=steps, limit=limit)
        curves[f"iwae, {steps} fast steps"] = found.estimates["iwae"].curve
    return curves


def plot_curves(curves: Curves, path: Path) -> None:
    """Nats per token over passes, with 95 % intervals over documents."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        values, passes = [x.nats_per_token for x in points.values()], [x.passes for x in points.values()]
        half = [x.interval[1] - x.nats_per_token for x in points.values()]
        axes.errorbar(passes, values, half, marker="o", capsize=3, label=name)
    axes.set(xlabel="passes through the decoder, forward or back", ylabel="held-out nats per token", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Scores the run, prints the table and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/inference-efficiency"), help="folder for the files")
    parser.add_argument("--limit", type=int, help="score only the first LIMIT sequences")
    options = parser.parse_args()
    curves = measure(load_run(options.run), options.limit)
    table = Table("estimator", "samples", "passes", "nats per token", "± s.e.")
    for name, points in curves.items():
        for samples, x in points.items():
            figures = (f"{x.nats_per_token:.4f}", f"{x.stderr_nats_per_token:.4f}")
            table.add_row(name, str(samples), str(x.passes), *figures)
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    plain = {name: {samples: asdict(x) for samples, x in points.items()} for name, points in curves.items()}
    (options.out / "inference_efficiency.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    plot_curves(curves, options.out / "inference_efficiency.png")


if __name__ == "__main__":
    main()
