"""`ltm fit --config FILE [--key value …]`: trains a model and writes a run directory."""

import sys

from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.train import train


def run(arguments: list[str]) -> int:
    """Trains; returns 0. Raises `UsageError`, or `KeyboardInterrupt` after an interrupted run is saved."""
    path = train(read_recipe(arguments))
    print(f"Run written to {path}; next: ltm evaluate {path}", file=sys.stderr)
    return 0
