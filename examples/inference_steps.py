"""How test-time inference improves the score: the bound by fast steps, the importance-weighted bound by samples.

    python examples/inference_steps.py runs/quickstart --out runs/inference-steps

Prints a table and writes ``inference_steps.json`` and ``inference_steps.png``.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.inference.estimators import Score
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run

FAST_STEPS, SAMPLES = (0, 4, 16, 64), (1, 8, 64)


def measure(run: Run, limit: int | None) -> dict[str, dict[str, Score]]:
    """Bound by fast steps, importance-weighted bound by samples, and one causal score as a reference."""

    def score(estimator: str, samples: int, steps: int | None) -> Score:
        result = evaluate_run(run, estimators=[estimator], samples=samples, fast_steps=steps, limit=limit)
        return result.estimates[estimator]

    return {
        "bound, by fast steps": {str(n): score("bound", 8, n) for n in FAST_STEPS},
        "iwae, by samples": {str(n): score("iwae", n, None) for n in SAMPLES},
        "causal, by block": {"16": score("causal", 8, None)},
    }


def plot_curves(curves: dict[str, dict[str, Score]], path: Path) -> None:
    """Two panels with error bars (two standard errors over sequences)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), ("bound, by fast steps", "iwae, by samples"), strict=True)
    for axes, name in panels:
        values = [score.nats_per_token for score in curves[name].values()]
        errors = [2 * score.stderr_nats_per_token for score in curves[name].values()]
        axes.errorbar(list(curves[name]), values, errors, marker="o", capsize=3)
        axes.set(title=name, xlabel=name.split("by ")[1], ylabel="held-out nats per token")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Scores the run, prints the table and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/inference-steps"), help="folder for table and figure")
    parser.add_argument("--limit", type=int, help="score only the first LIMIT sequences")
    options = parser.parse_args()
    curves = measure(load_run(options.run), options.limit)
    table = Table("estimator", "", "nats per token", "± s.e.", "a bound?")
    for name, points in curves.items():
        for at, score in points.items():
            figures = (f"{score.nats_per_token:.4f}", f"{score.stderr_nats_per_token:.4f}")
            table.add_row(name, at, *figures, "yes" if score.is_bound else "no")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    plain = {name: {at: vars(score) for at, score in points.items()} for name, points in curves.items()}
    (options.out / "inference_steps.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    plot_curves(curves, options.out / "inference_steps.png")


if __name__ == "__main__":
    main()
