"""Which training recipe makes thoughts worth their KL: starts, slow gradients, warm starts at equal training FLOPs.

    ltm data pack CORPUS.jsonl --out data/corpus --tokenizer bpe:1024 --seq-len 512
    python benchmarks/bench_training_recipes.py --data data/corpus --out runs/grid

Thirteen trainings, of minutes each; an existing run is not trained again. Prints the table of
docs/training-recipes.md and writes it as JSON. Without the data it says so.
"""

import argparse
import json
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ltm_pyro.evaluation.evaluate import evaluate_run
from ltm_pyro.runs.load import load_run
from ltm_pyro.studies.ar_baseline import ar_baseline
from ltm_pyro.studies.configure import Values, as_options
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.run_directory import CHECKPOINT
from ltm_pyro.training.train import train

RECIPE = Path(__file__).parents[1] / "studies" / "recipes" / "grid.yaml"
RATES = {"prior": 0.1, "moving": 0.2, "narrow": 0.3}


def cell(decoder: str, gradient: str, start: str) -> Values:
    """What one cell of the grid changes in the recipe; a warm decoder trains without thoughts for 60 % of its FLOPs."""
    without = 0.6 if decoder == "warm" else 0.0
    curriculum = {"steps": [[0, 0], [without, 0], [without, 4], [1, 4]] if without else [[0, 4], [1, 4]]}
    if start != "prior":
        first, last = (-4, 0) if start == "moving" else (-5, -5)
        curriculum["log_var"] = [[0, first], [without, first], [1, last]]
    return {
        "model.inference.slow_gradient": gradient,
        "model.inference.rate": RATES[start],
        "model.curriculum": curriculum,
        "model.decoder.init_args.zero_init_cross_attention": decoder == "warm",
    }


def cells() -> dict[str, Values]:
    """Every run's name and recipe settings, the baseline last."""
    grid = product(("warm", "scratch"), ("trajectory", "last"), ("prior", "moving", "narrow"))
    return {" ".join(choice): cell(*choice) for choice in grid} | {"autoregressive": ar_baseline()}


def measure(name: str, settings: Values, arguments: argparse.Namespace) -> dict[str, float | str]:
    """Trains one cell unless it is there, and scores it."""
    run = Path(arguments.out) / name.replace(" ", "-")
    if not (run / CHECKPOINT).exists():
        places = ("--run", str(run), "--data.directory", arguments.data, "--force")
        train(read_recipe(["--config", str(RECIPE), *places, *as_options(settings), *arguments.further]))
    scored = evaluate_run(load_run(run), estimators=["bound", "iwae", "prior"], samples=8, limit=arguments.limit)
    bound, prior = scored.estimates["bound"], scored.estimates["prior"]
    return {
        "name": name,
        **{estimator: score.nats_per_token for estimator, score in scored.estimates.items()},
        "stderr": bound.stderr_nats_per_token,
        "kl": bound.kl_nats_per_token,
        "gain": prior.nats_per_token - bound.nats_per_token,
    }


def main() -> None:
    """Trains, scores, prints and writes; further arguments go to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/corpus", help="packed data, sequences of 512")
    parser.add_argument("--out", default="runs/grid", help="where the runs and the table go")
    parser.add_argument("--limit", type=int, default=64, help="held-out sequences to score")
    arguments, arguments.further = parser.parse_known_args(namespace=argparse.Namespace(further=[]))
    if not Path(arguments.data).exists():
        print(f"not run: no packed data at {arguments.data}; pack some with `ltm data pack` and name it with --data")
        return
    rows = [measure(name, settings, arguments) for name, settings in cells().items()]
    (Path(arguments.out) / "grid.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{x:.4f}" if isinstance(x, float) else x for x in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
