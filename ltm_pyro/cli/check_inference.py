"""`ltm check-inference [RUN]`: every shipped guide against known posteriors, or a run against the texts it writes."""

import argparse
from importlib import import_module
from typing import Any

from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_seed, at_least
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.extras import extra

OF_RUN: dict[str, Any] = {"sequences": 16, "chains": 16, "temperatures": 32, "device": "cpu"}
NOTES = {
    "iwae": "the run's importance-weighted bound, with as many draws",
    "ais": "not below the evidence, in expectation",
    "reverse_ais": "not above the evidence, in expectation",
    "gap": "ais - reverse_ais: how far either can be from the evidence",
}
STUDY = "ltm_pyro.studies.check_inference"  # by dotted path: the command line imports no model and no guide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm check-inference`."""
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="run directory or checkpoint: sandwiches the evidence of texts it generates",
    )
    add_seed(parser, "random seed of data and noise")
    of_run = parser.add_argument_group("with RUN")
    of_run.add_argument("--sequences", type=at_least(2), metavar="N", help="generated texts")
    of_run.add_argument("--chains", type=at_least(1), metavar="S", help="chains per text in each direction")
    of_run.add_argument(
        "--temperatures", type=at_least(1), metavar="N", help="distributions between q and the posterior"
    )
    add_device(parser)
    parser.set_defaults(**OF_RUN)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints truth, estimate and error; returns 0."""
    if args.run:
        return _sandwich(args)
    given = [f"--{name}" for name, default in OF_RUN.items() if getattr(args, name) != default]
    if given:
        raise UsageError(f"Without a run {', '.join(given)} would have no effect: give RUN, or leave that out.")
    console = Console(stderr=True)
    with console.status("fitting every guide on the models with known answers …"):
        report = import_module(STUDY).check_inference(args.seed)
    if args.json:
        print_json(report | {"left_out": import_module(STUDY).LEFT_OUT})
        return 0
    for model, guides in report.items():
        for guide, figures in guides.items():
            Console().print(_table(f"{guide} on {model.replace('_', ' ')}: {figures['verdict']}", figures))
    for guide, reason in import_module(STUDY).LEFT_OUT.items():
        Console().print(f"{guide} is left out: {reason}.", soft_wrap=True)
    return 0


def _sandwich(args: argparse.Namespace) -> int:
    """The evidence of texts that a run generates, from both sides, and the run's bound between them."""
    extra("xarray", "analysis", "ltm check-inference RUN")
    from ltm_pyro.analysis.calibration import simulate_texts
    from ltm_pyro.analysis.evidence import sandwich
    from ltm_pyro.inference.ais import Annealing
    from ltm_pyro.runs.load import load_run

    run, annealing = load_run(args.run, args.device), Annealing(temperatures=args.temperatures)
    with Console(stderr=True).status("annealing in both directions …"):
        parts = (run.model, run.guide, run.inference, simulate_texts(run))
        found = sandwich(*parts, args.sequences, args.chains, annealing, args.seed).as_dict()
    if args.json:
        print_json(found)
        return 0
    title = f"{args.run}: {found['sequences']} texts of its own, {found['tokens']:,} tokens"
    table = Table("-log p(x)", "nats/token", "± s.e.", "", title=title, title_justify="left")
    for name, note in NOTES.items():
        error = found["stderr"][name]
        table.add_row(name, f"{found['nats_per_token'][name]:.4f}", "" if error is None else f"{error:.4f}", note)
    Console().print(table)
    return 0


def _table(title: str, figures: dict[str, Any]) -> Table:
    table = Table("quantity", "estimate", "± s.e.", "error", "", title=title, title_justify="left")
    of_q, exact = figures.get("errors", {}), figures.get("compared_with") == "the posterior"
    for truth, errors in of_q.items():
        name = figures["compared_with"] if truth == "best" else "the posterior"
        for quantity, error in errors.items() if truth == "best" or not exact else ():
            table.add_row(f"{quantity}, largest error", "", "", f"{error:.1e}", f"against {name}")
    table.add_row("log evidence (nats per sequence)", f"{figures['log_evidence']:.4f}", "", "", "truth")
    for name, bound in (*figures["bounds"].items(), ("reused_noise", figures["reused_noise"])):
        note = "a bound" if bound["is_bound"] else "NOT a bound"
        cells = (f"{bound['estimate']:.4f}", f"{bound['stderr']:.4f}", f"{bound['above_evidence']:+.4f}")
        table.add_row(name.replace("_", " "), *cells, note)
    worst, trusted = max(figures["pareto_k"]), figures["trusted_sequences"]
    table.add_row("Pareto k-hat, worst", f"{worst:.2f}", "", "", f"{trusted} of {len(figures['pareto_k'])} below 0.7")
    return table
