"""`ltm evaluate RUN`: scores held-out text by several estimators, or computes the suites of the paper's table."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_trust, at_least
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.estimators import DEFAULT, ESTIMATORS, Evaluation, check_estimators
from ltm_pyro.utils.console import Console

# options that have an effect only without or only with --suite, and their defaults
OF_ESTIMATORS: dict[str, Any] = {"data": None, "estimators": ",".join(DEFAULT), "block": 16, "normaliser": None}
OF_SUITES: dict[str, Any] = {
    "suite_dir": None,
    "source": [],
    "baseline": None,
    "shots": 3,
    "attempts": 5,
    "features": None,
    "out": None,
    "force": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm evaluate`."""
    parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--data", metavar="DIR_OR_FILE", help="packed data, text or JSONL; by default the run's own")
    parser.add_argument("--estimators", metavar="A,B,…", help=f"any of {', '.join(ESTIMATORS)}")
    parser.add_argument("--samples", type=at_least(1), default=16, metavar="S", help="draws per sequence after the fit")
    parser.add_argument(
        "--fast-steps", type=at_least(0), metavar="N", help="fast steps per fit; by default the recipe's"
    )
    parser.add_argument("--block", type=at_least(1), metavar="N", help="tokens per block of the estimator `causal`")
    parser.add_argument(
        "--normaliser",
        type=at_least(2),
        metavar="N",
        help="draws for an estimate of the normaliser of an unnormalised prior",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N sequences")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="random seed")
    add_device(parser)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    suites = parser.add_argument_group("suites: the paper's evaluation table")
    suites.add_argument(
        "--suite", metavar="A,B,…", help="any of zero-shot, multilingual, gsm8k, reconstruction, generation"
    )
    suites.add_argument("--suite-dir", type=Path, metavar="DIR", help="folder with the data sets")
    suites.add_argument(
        "--source", action="append", metavar="NAME=PLACE", help="file or folder of one data set; can be repeated"
    )
    suites.add_argument("--baseline", metavar="RUN", help="an autoregressive run to compare with")
    suites.add_argument("--shots", type=at_least(0), metavar="N", help="worked examples of gsm8k, if they fit")
    suites.add_argument("--attempts", type=at_least(1), metavar="N", help="generated answers per question of gsm8k")
    suites.add_argument("--features", metavar="DIR", help="run or Hugging Face model for MAUVE's features")
    suites.add_argument("--out", type=Path, metavar="DIR", help="results and report; by default RUN/suites")
    suites.add_argument("--force", action="store_true", help="replace results of other settings")
    parser.set_defaults(**OF_ESTIMATORS, **OF_SUITES)


def run(args: argparse.Namespace) -> int:
    """Scores the run and prints a table or one JSON object; returns 0."""
    _check(args)
    if args.suite:
        return _suites(args)
    estimators = args.estimators.split(",")
    check_estimators(estimators)
    from ltm_pyro.evaluation.evaluate import evaluate_run
    from ltm_pyro.runs.load import load_run

    trained = load_run(args.run, args.device, args.trust)
    evaluation = evaluate_run(
        trained,
        args.data,
        estimators,
        args.samples,
        args.fast_steps,
        args.limit,
        args.seed,
        args.block,
        args.normaliser,
    )
    if args.json:
        print(json.dumps(evaluation.as_dict()))
    else:
        Console().print(_table(evaluation, args.run))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    ignored = OF_ESTIMATORS if args.suite else OF_SUITES
    given = [f"--{name.replace('_', '-')}" for name, default in ignored.items() if getattr(args, name) != default]
    if given and args.suite:
        raise UsageError(f"The suites choose their own data and estimators: leave out {', '.join(given)}.")
    if given:
        raise UsageError(f"Without --suite {', '.join(given)} would have no effect: name a suite, or leave that out.")


def _suites(args: argparse.Namespace) -> int:
    from ltm_pyro.evaluation.suites.suite import Options
    from ltm_pyro.evaluation.suites.table import evaluate_suites, markdown

    options = Options(
        directory=args.suite_dir,
        sources=_sources(args.source),
        limit=args.limit,
        samples=args.samples,
        fast_steps=args.fast_steps,
        seed=args.seed,
        shots=args.shots,
        attempts=args.attempts,
        features=args.features,
        judge=args.baseline,
        trust=args.trust,
    )
    run = Path(args.run)
    out = args.out or (run if run.is_dir() else run.parent) / "suites"
    content = evaluate_suites(args.run, args.suite.split(","), options, out, args.baseline, args.force, args.device)
    print(json.dumps(content) if args.json else markdown(content))
    return 0


def _sources(given: list[str]) -> dict[str, str]:
    from ltm_pyro.evaluation.suites.table import SOURCES

    sources: dict[str, str] = {}
    for text in given:
        name, found, place = text.partition("=")
        if not (name and found and place):
            raise UsageError(f"--source {text} is not NAME=PLACE: write for example ptb=/data/ptb.test.txt.")
        if name not in SOURCES:
            raise UsageError(f"--source {text} names no data set of the suites: choose from {', '.join(SOURCES)}.")
        if name in sources:
            raise UsageError(f"--source {name} is given twice, as {sources[name]} and {place}: leave one out.")
        sources[name] = place
    return sources


def _table(evaluation: Evaluation, title: str) -> Table:
    e = evaluation
    title = f"{title}: {e.sequences:,} sequences, {e.tokens:,} tokens, {e.bytes:,} bytes"
    table = Table("estimator", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("nats/token", "± s.e.", "perplexity", "bits/byte", "KL/token", "a bound?"):
        table.add_column(f" {column}", justify="right", no_wrap=True)
    for name, s in e.estimates.items():
        figures = (s.nats_per_token, s.stderr_nats_per_token, s.perplexity, s.bits_per_byte, s.kl_nats_per_token)
        table.add_row(name, *(f"{x:.4f}" for x in figures), "yes" if s.is_bound else "no")
    if e.thinking_gain:
        gain = (e.thinking_gain.nats_per_token, e.thinking_gain.stderr_nats_per_token)
        table.add_row("prior - bound", *(f"{x:.4f}" for x in gain))
    reasons = (f"{name}: unavailable, because {reason}." for name, reason in e.unavailable.items())
    table.caption = " ".join(reasons) or None
    return table
