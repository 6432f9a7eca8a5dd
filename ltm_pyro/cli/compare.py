"""`ltm compare`: priors and guides trained for the same time and scored side by side."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ltm_pyro.cli.arguments import at_least
from ltm_pyro.contracts import UsageError

COLUMNS = ("bound", "iwae", "without_thinking", "thinking_gain", "kl", "k_hat", "seconds_per_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm compare`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe that every training follows")
    parser.add_argument(
        "--priors", default="GaussianPrior", metavar="A,B,…", help="names, dotted paths or file.py:Name"
    )
    parser.add_argument("--guides", default="MeanField", metavar="A,B,…", help="the same for guides")
    parser.add_argument("--minutes", type=float, default=2.0, metavar="X", help="of training for each pair")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="where the runs go")
    parser.add_argument(
        "--samples", type=at_least(1), default=16, metavar="S", help="draws per sequence for the bounds"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="score only the first N held-out sequences")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of `ltm fit`; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains, scores, and prints one table; returns 0. The same command goes on after an interruption."""
    from ltm_pyro.comparison import Comparison  # here, so that --help need not wait for Lightning

    if not args.minutes > 0:
        raise UsageError(f"--minutes is {args.minutes}: give each pair some time, such as 2.")
    if not Path(args.config).is_file():
        raise UsageError(f"There is no recipe {args.config}: give a YAML file.")
    comparison = Comparison(
        config=args.config,
        priors=args.priors.split(","),
        guides=args.guides.split(","),
        minutes=args.minutes,
        out=args.out,
        samples=args.samples,
        limit=args.limit,
        options=[f"--{option}" for option in args.option],
    )
    comparison.begin()
    pairs, rows, console = comparison.pairs(), [], Console(stderr=True)
    for index, (prior, guide, options) in enumerate(pairs):
        title = "autoregressive twin" if options else f"{prior} with {guide}"
        console.print(f"{index + 1} of {len(pairs)}: {title}, {args.minutes:g} minutes", soft_wrap=True)
        rows.append(comparison.row(prior, guide, options))
    if args.json:
        print(json.dumps({"minutes": args.minutes, "out": str(args.out), "rows": rows}))
    else:
        Console().print(_table(rows, args.minutes))
    return 0


def _table(rows: list[dict[str, Any]], minutes: float) -> Table:
    title = f"nats per held-out token after {minutes:g} minutes each"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        table.add_column(f" {column.replace('_', ' ')}", justify="right")
    for row in rows:
        table.add_row(row["name"], *("-" if row[c] is None else f"{row[c]:.3f}" for c in COLUMNS))
    for row in (row for row in rows if row["no_bound"]):
        table.caption = f"{table.caption or ''}{row['name']}: no bound, for {row['no_bound']}. "
    return table
