"""What early stopping saves: fast steps per sequence at an equal bound, on a run's own held-out text.

    python benchmarks/bench_stopping_rule.py --run runs/prose [--steps 32] [--json]

A fixed T_fast gives a bound; the rule, allowed as many steps, should give the same one (within 0.005 nats per token)
with at least 30 % fewer sequence-steps. Without a run it says so and measures nothing.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from ltm_pyro.data import load_text_or_pack
from ltm_pyro.inference.elbo import Draws, elbo_terms
from ltm_pyro.inference.local import infer_local
from ltm_pyro.inference.state import LocalInference, Stop
from ltm_pyro.runs.load import load_run
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.rng import seeded

RULES = [Stop(window=w, tolerance=t) for w, t in ((4, 0.1), (6, 0.5), (6, 2.0), (8, 0.5), (8, 2.0))]


def measure(run: Run, inference: LocalInference, samples: int = 16) -> tuple[float, float]:
    """Nats per held-out token (fresh draws after q is final), and fast steps per sequence."""
    dataset = load_text_or_pack(run.data, run.tokenizer, run.length)
    nats = tokens = steps = sequences = 0.0
    for index, batch in enumerate(DataLoader(dataset, batch_size=32, collate_fn=dataset.collate)):
        with seeded(0, index), torch.no_grad():
            batch = run.model.prepare(batch)
            state, info = infer_local(run.model, run.guide, batch, inference)
        with seeded(1, index), torch.no_grad():
            elbo_SB = elbo_terms(run.model, run.guide, batch, state.parameters, Draws(samples)).elbo_B
        nats -= elbo_SB.mean(0).sum().item()
        tokens += batch.tokens_B.sum().item()
        steps += info.steps_B.sum().item()
        sequences += batch.size
    return nats / tokens, steps / sequences


def compare(run: Run, most: int) -> list[dict[str, float | str]]:
    """The fixed number of steps, then every rule with that many at most."""
    fixed = replace(run.inference, steps=most)
    bound, steps = measure(run, fixed)
    rows: list[dict[str, float | str]] = [{"rule": f"fixed {most}", "bound": bound, "steps": steps, "saved": 0.0}]
    for rule in RULES:
        found, taken = measure(run, replace(fixed, stop=rule))
        name = f"window {rule.window}, tolerance {rule.tolerance}"
        rows.append({"rule": name, "bound": found, "steps": taken, "saved": 1 - taken / steps})
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/prose", help="run directory or checkpoint")
    parser.add_argument("--steps", type=int, default=32, help="the fixed number of fast steps, and the rules' most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not Path(options.run).exists():
        print(f"not run: no run at {options.run}; `python -m ltm_pyro.studies.prose` makes one")
        return
    rows = compare(load_run(options.run), options.steps)
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("rule", "nats/token", "steps per sequence", "saved")
    for row in rows:
        table.add_row(str(row["rule"]), f"{row['bound']:.4f}", f"{row['steps']:.1f}", f"{row['saved']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
