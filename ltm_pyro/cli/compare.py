"""`ltm compare`: priors and guides trained for the same budget and scored side by side."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ltm_pyro.cli.arguments import add_trust, at_least, positive
from ltm_pyro.cli.resumable import resumable
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

STUDY = "ltm_pyro.studies.compare"  # by dotted path: the command line imports no study
REFERENCES = {
    "autoregressive": "autoregressive baseline",
    "floor": "floor: constant thoughts",
    "ceiling": "ceiling: full attention",
}
COLUMNS = {  # figure to head, and the figure that is its standard error
    "bound": ("bound", "stderr"),
    "difference": ("above\nAR", "difference_stderr"),
    "iwae": ("iwae", None),
    "predictive_gain": ("predictive\ngain", "predictive_gain_stderr"),
    "kl": ("kl", None),
    "k_hat": ("k-hat", None),
    "seconds_per_step": ("s/step", None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm compare`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe that every training follows")
    parser.add_argument(
        "--priors", default="GaussianPrior", metavar="A,B,…", help="names, dotted paths or file.py:Name"
    )
    parser.add_argument("--guides", default="MeanField", metavar="A,B,…", help="the same for guides")
    parser.add_argument("--minutes", type=positive, metavar="X", help="of training for each pair; 2 by default")
    parser.add_argument("--budget", metavar="N[flops|s|m|h]", help="of each training instead, such as 2e13flops")
    about = "train the floor and the ceiling of the context recovered as well, and give R of each pair"
    parser.add_argument("--context", action="store_true", help=about)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="where the runs go")
    parser.add_argument(
        "--samples", type=at_least(1), default=16, metavar="S", help="draws per sequence for the bounds"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="score only the first N held-out sequences")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of `ltm fit`; repeatable")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains, scores, and prints one table; returns 0. The same command resumes after an interruption."""
    if args.minutes is not None and args.budget:
        raise UsageError("--minutes and --budget both say what each pair may spend: give one.")
    minutes = 2.0 if args.minutes is None else args.minutes
    if round(60 * minutes) < 1:
        raise UsageError(f"--minutes is {minutes}: give each pair a second at least, such as 2 minutes.")
    if not Path(args.config).is_file():
        raise UsageError(f"There is no recipe {args.config}: give a YAML file.")
    study = import_module(STUDY)
    budget = study.parse_budget(args.budget) if args.budget else study.Budget(60 * minutes, "s")
    said = args.budget or f"{minutes:g} minutes"
    comparison = study.Comparison(
        config=args.config,
        priors=[name.strip() for name in args.priors.split(",")],
        guides=[name.strip() for name in args.guides.split(",")],
        budget=budget,
        out=args.out.expanduser(),
        samples=args.samples,
        limit=args.limit,
        options=[f"--{option}" for option in args.option],
        trust=args.trust,
        context=args.context,
    )
    comparison.check()
    comparison.write_settings()
    pairs, rows, console = comparison.pairs, [], Console(stderr=True)
    for number, pair in enumerate(pairs, 1):
        title = REFERENCES.get(pair.reference) or f"{pair.prior} with {pair.guide}"
        console.print(f"{number} of {len(pairs)}: {title}, {said}", soft_wrap=True)
        with resumable(args.out):
            rows.append(comparison.figures(pair) | comparison.difference(pair) | comparison.recovered(pair))
    if args.json:
        spends = {"minutes": budget.amount / 60} if budget.unit == "s" else {"budget": args.budget}
        print_json({**spends, "out": str(args.out), "rows": rows})
    else:
        Console().print(_table(rows, said))
    return 0


def _table(rows: list[dict[str, Any]], said: str) -> Table:
    title = (
        f"nats per held-out token ± s.e. after {said} each; {rows[0]['sequences']:,} sequences, "
        f"{rows[0]['tokens']:,} tokens"
    )
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("prior", overflow="fold")
    table.add_column("guide", overflow="fold")
    for head, _ in COLUMNS.values():
        table.add_column(head, justify="right")
    for row in rows:
        pair = (row["name"], "") if row["name"] in REFERENCES else (row["prior"], row["guide"])
        table.add_row(*pair, *(_cell(row, figure, error) for figure, (_, error) in COLUMNS.items()))
    notes = [
        f"{row['name']}: no bound, because {row['no_bound']}; {row['without_thinking']:.3f} without thinking."
        for row in rows
        if row["no_bound"]
    ]
    if short := rows[0].get("shorter_than_a_block"):  # not in results of before
        notes.append(f"{short:,} sequences are no longer than a block and have no predictive gain.")
    spent = [flops for row in rows if (flops := row.get("flops"))]
    if spent and max(spent) > 1.02 * min(spent):
        notes.append(f"They spent {min(spent):.4g} to {max(spent):.4g} FLOPs each: these differ by more than 2 %.")
    elif spent:
        notes.append(f"They spent {min(spent):.4g} to {max(spent):.4g} FLOPs each.")
    for row in rows:
        if row.get("context_recovered") is not None:
            low, high = row["context_recovered_interval"]
            share = row["context_recovered"]
            notes.append(f"{row['name']}: context recovered {share:.2f} (95 % interval {low:.2f} to {high:.2f}).")
    table.caption = "\n".join(notes)
    return table


def _cell(row: dict[str, Any], figure: str, error: str | None) -> str:
    if row[figure] is None:
        return "-"
    stderr = row[error] if error else None
    return f"{row[figure]:.3f}" + (f"\n±{stderr:.3f}" if stderr is not None else "")
