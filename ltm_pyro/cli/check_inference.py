"""`ltm check-inference`: every shipped guide against known posteriors and evidences."""

import argparse
import json
from importlib import import_module
from typing import Any

from rich.table import Table

from ltm_pyro.utils.console import Console

STUDY = "ltm_pyro.studies.check_inference"  # by dotted path: the command line imports no model and no guide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm check-inference`."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of data and noise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints truth, estimate and error; returns 0."""
    console = Console(stderr=True)
    with console.status("fitting every guide on the models with known answers …"):
        report = import_module(STUDY).check_inference(args.seed)
    if args.json:
        print(json.dumps(report))
        return 0
    for model, guides in report.items():
        for guide, figures in guides.items():
            Console().print(_table(f"{guide} on {model.replace('_', ' ')}", figures))
    return 0


def _table(title: str, figures: dict[str, Any]) -> Table:
    table = Table("quantity", "estimate", "± s.e.", "error", "", title=title, title_justify="left")
    for name in ("mean_error", "variance_relative_error", "covariance_relative_error"):
        if name in figures:
            table.add_row(name.replace("_", " "), "", "", f"{figures[name]:.1e}", "")
    table.add_row("log evidence (nats per sequence)", f"{figures['log_evidence']:.4f}", "", "", "truth")
    for name, bound in (*figures["bounds"].items(), ("reused_noise", figures["reused_noise"])):
        note = "a bound" if bound["is_bound"] else "NOT a bound"
        cells = (f"{bound['estimate']:.4f}", f"{bound['stderr']:.4f}", f"{bound['above_evidence']:+.4f}")
        table.add_row(name.replace("_", " "), *cells, note)
    worst, trusted = max(figures["pareto_k"]), figures["trusted_sequences"]
    table.add_row("Pareto k-hat, worst", f"{worst:.2f}", "", "", f"{trusted} of {len(figures['pareto_k'])} below 0.7")
    return table
