"""`ltm bench`: what a training step, attention and generation cost here, beside the published structure."""

import argparse
import time
from collections.abc import Collection, Iterable
from importlib import import_module
from typing import Any

import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import finite, print_json
from ltm_pyro.utils.console import Console

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STUDY = "ltm_pyro.studies.bench.suites"  # by dotted path: the command line imports no model and no guide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm bench`."""
    about = "steps, pyro, attention, generation, sweeps, head; the first four when none is named"
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=about)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed, in turn")
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="NAME",
        help="of steps and pyro: tiny, wide, ltm-small, cuda-small, cuda-large, cuda-graph",
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="of torch; all cores when not given")
    about = "wall, or cpu: processor time, for a machine with other work (then with --threads 1)"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=about)
    parser.add_argument("--eager", action="store_true", help="without torch's compiler, which takes minutes")
    parser.add_argument("--data", metavar="DIR", help="instead of all suites: how fast this packed corpus is loaded")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0."""
    if args.data:
        print_json(_measure_reading(args.data, args.clock))
        return 0
    study = import_module(STUDY)
    chosen = args.suites or ["steps", "pyro", "attention", "generation"]
    _check("suite", chosen, [*study.BY_SETTING, *study.SUITES])
    _check("setting", args.settings or [], study.ALL_SETTINGS)
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise UsageError(f"Rounds and threads must be at least 1, got {args.rounds} and {args.threads}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    how = study.How(args.rounds, args.clock, compiled=not args.eager)
    with Console(stderr=True).status("measuring") as status:

        def tell(what: str) -> None:
            status.update(f"measuring {what}; leave the machine alone meanwhile …")

        report = study.bench(chosen, how, args.settings, tell)
    if args.json:
        print_json(report)
    else:
        Console().print_json(data=finite(report), indent=2)
    return 0


def _check(what: str, names: Iterable[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"There is no {what} '{unknown[0]}': choose from {', '.join(known)}.")


def _measure_reading(place: str, clock: str) -> dict[str, Any]:
    """Tokens per second of the data loader alone, by worker processes; processor time is known of this process only."""
    from ltm_pyro.data.speed import reading_speed

    workers = (0, 1, 2) if clock == "wall" else (0,)
    return {
        "clock": clock,
        "tokens_per_second": {n: round(reading_speed(place, n, clock=CLOCKS[clock])) for n in workers},
    }
