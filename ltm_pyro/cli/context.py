"""`ltm context`: how much of what a window cannot see the thoughts carry, between a floor and a ceiling."""

import argparse
import json
import math
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.panel import Panel
from rich.table import Table

from ltm_pyro.cli.arguments import add_trust, at_least
from ltm_pyro.cli.resumable import resumable
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import finite, print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import atomic_write, local_path, writing

if TYPE_CHECKING:
    from ltm_pyro.evaluation.context import Context
    from ltm_pyro.runs.run import Run

STUDY, PICTURE = "ltm_pyro.studies.context", "ltm_pyro.studies.context_picture"  # the command line imports no study
KINDS = {
    "floor": "floor, whose thoughts are constants",
    "ceiling": "ceiling, with full attention",
    "thoughts": "Latent-Thought model",
}
RESULT, IMAGE = "context.json", "context.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm context`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe of the Latent-Thought model")
    parser.add_argument("--out", type=Path, default=Path("runs/context"), metavar="DIR", help="where the runs go")
    about = "models of each kind, trained with the seeds 0, 1, …; three or more give an interval over them"
    parser.add_argument("--seeds", type=at_least(1), default=1, metavar="N", help=about)
    parser.add_argument("--samples", type=at_least(1), default=64, metavar="S", help="draws per sequence")
    about = "tokens that are predicted together, from all before them, for the picture and `causal_prior`"
    parser.add_argument("--block", type=at_least(1), default=16, metavar="N", help=about)
    parser.add_argument("--split", choices=["val", "test"], default="val", help="what is scored")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="score only the first N sequences")
    about = "label of the documents that no model is told: do probes and clusters of the thoughts find it?"
    parser.add_argument("--label", metavar="NAME", help=about)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of `ltm fit`; repeatable")
    about = "runs that are trained at a time, each in a process of its own with a log beside its folder"
    parser.add_argument("--workers", type=at_least(1), default=1, metavar="N", help=about)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains, scores, prints R and writes the picture; returns 0. The same command resumes after an interruption."""
    if not Path(args.config).is_file():
        raise UsageError(f"There is no recipe {args.config}: give a YAML file.")
    out = local_path(args.out, "--out")
    names = ("config", "seeds", "samples", "block", "split", "limit", "label", "trust")
    extra("xarray", "analysis", "ltm context")
    study = import_module(STUDY).ContextStudy(
        out=out, options=[f"--{option}" for option in args.option], **{name: getattr(args, name) for name in names}
    )
    study.check()
    console = Console(stderr=True)
    scored = {}
    with resumable(out):
        if args.workers > 1:
            scored = study.score_beside(args.workers, lambda line: console.print(line, soft_wrap=True))
        else:
            for number, (kind, seed) in enumerate(study.runs, 1):
                console.print(f"{number} of {len(study.runs)}: {KINDS[kind]}, seed {seed}", soft_wrap=True)
                scored[kind, seed] = study.score(kind, seed)
        result = study.result(scored)
        picture = import_module(PICTURE)
        found = picture.labelled(result.run, args.label, args.split, args.limit) if args.label else None
        with writing(out):
            picture.write_picture(out / IMAGE, result, args.block, found)
            summary = finite(
                {
                    "out": str(out),
                    "context": result.context.as_dict(),
                    "by_position": result.by_position,
                    "label": found and found.as_dict(),
                }
            )
            with atomic_write(out / RESULT) as new:
                new.write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n", "utf-8")
    if args.json:
        print_json(summary)
        return 0
    console = Console()
    console.print(context_table(result.context, result.run, ("floor", "ceiling")))
    if found:
        for line in found.sentences():
            console.print(line, soft_wrap=True)
        console.print(f"One prompt, continued under the thoughts of a text of each {args.label}:", soft_wrap=True)
        for name, text in found.continuations.items():
            console.print(Panel(found.prompt + text, title=name, title_align="left"))
    console.print(f"Written: {out / RESULT} and {out / IMAGE}.", soft_wrap=True)
    return 0


def context_table(context: "Context", run: "Run", names: tuple[str, str]) -> Table:
    """R of every estimator between the floor and the ceiling of these names, or why there is none."""
    from ltm_pyro.evaluation.context import NULLS

    floor, ceiling = names
    title = f"context recovered: R = ({floor} - model) / ({floor} - {ceiling})"
    table = Table("", title=title, title_justify="left")
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1)
    for column in ("nats/token", "± s.e.", "below", "± s.e.", "R", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, figures: Iterable[float], *of_r: str) -> None:
        table.add_row(name, *(f"{value:.4f}" if math.isfinite(value) else "-" for value in figures), *of_r)

    row(floor, (context.floor.nats_per_token, context.floor.stderr_nats_per_token))
    for name, x in context.ahead.items():
        r = context.recovered.get(name)
        of_r = (f"{r.share:.2f}", " to ".join(f"{end:.2f}" for end in r.interval)) if r else ()
        row(f"{name} (null)" if name in NULLS else name, x, *of_r)
    rates = (context.ceiling, context.difference)
    row(ceiling, [x for rate in rates for x in (rate.nats_per_token, rate.stderr_nats_per_token)])
    decoder: Any = run.model.decoder
    window, (layers, thoughts, _) = decoder.window, decoder.thought_shape
    notes = [
        f"Below: how far below {floor}, paired by document.",
        f"A prediction sees {run.reach} tokens; a window of {window}, {layers} x {thoughts} thoughts.",
    ]
    if not context.has_context:
        few = "No R: full attention is not ahead by three standard errors"
        notes.append(f"{few}: there is nothing to carry, or it has not learned to.")
    keys, most = decoder.layers * (window or run.length) + layers * thoughts, decoder.layers * run.length
    cost = f"{keys:,} keys instead of up to {most:,}"
    table.caption = " ".join([*notes, f"A generated token reads {cost}."])
    return table
