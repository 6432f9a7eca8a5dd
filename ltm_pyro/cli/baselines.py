"""`ltm baselines --config RECIPE`: a Latent-Thought model beside autoregressive models and masked diffusion."""

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
from ltm_pyro.utils.files import check_folder, local_path, lock_folder
from ltm_pyro.utils.limits import LARGEST_SEED

STUDY = "ltm_pyro.studies.baselines"  # by dotted path: the command line imports no study
REPORT = "ltm_pyro.studies.baselines_report"
PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm baselines`."""

    def seeds(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(at_least(0, LARGEST_SEED)(part) for part in text.split(",")))

    def rates(text: str) -> tuple[float, ...]:
        return tuple(sorted({positive(part) for part in text.split(",")}))

    def share(text: str) -> float:
        if (value := positive(text)) > 1:
            raise argparse.ArgumentTypeError(f"{text!r} is more than all of the budget")
        return value

    parser.add_argument("--config", required=True, metavar="FILE", help="the Latent-Thought model's recipe")
    parser.add_argument(
        "--data", metavar="DIR", help="packed data with a val and a test split; the recipe's by default"
    )
    about = "what all models have equal: flops or tokens of training, or their number of parameters"
    parser.add_argument("--match", choices=("flops", "tokens", "parameters"), default="flops", help=about)
    parser.add_argument("--budget", required=True, metavar="N", help="of each training: 2e12flops or 4e6tokens")
    parser.add_argument("--seeds", type=seeds, default=(0,), metavar="N,…", help="of the trainings (default: 0)")
    about = "factors of the recipe's slow rate, of which each model takes its best on the validation split"
    parser.add_argument(
        "--rates", type=rates, default=(0.5, 1.0, 2.0), metavar="X,…", help=f"{about} (default: 0.5,1,2)"
    )
    parser.add_argument(
        "--search-share", type=share, default=0.2, metavar="X", help="share of the budget for each rate"
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=16, metavar="S", help="draws per sequence for the bounds"
    )
    parser.add_argument("--limit", type=at_least(2), metavar="N", help="score only the first N held-out sequences")
    parser.add_argument("--texts", type=at_least(0), default=64, metavar="N", help="texts that each model writes")
    parser.add_argument(
        "--suite-dir", type=Path, metavar="DIR", help="data of the zero-shot suite, to score them as well"
    )
    about = "folder of the runs and the page; the same command goes on where it was interrupted"
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), metavar="DIR", help=about)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains what is missing, scores it, and writes one page; returns 0. Raises `UsageError`."""
    if not Path(args.config).is_file():
        raise UsageError(f"There is no recipe {args.config}: give a YAML file.")
    out = local_path(args.out, "--out")
    check_folder(out, "--out")
    suites = None
    if args.suite_dir is not None:
        from ltm_pyro.evaluation.suites import zero_shot
        from ltm_pyro.evaluation.suites.suite import Options

        suites = Options(directory=args.suite_dir, limit=args.limit, samples=args.samples)
        zero_shot.parts(suites)  # which raises if there are none
    study, report = import_module(STUDY), import_module(REPORT)
    baselines = study.Baselines(
        config=args.config,
        data=args.data,
        match=args.match,
        budget=args.budget,
        seeds=args.seeds,
        rates=args.rates,
        share=args.search_share,
        samples=args.samples,
        limit=args.limit,
        out=out,
        trust=args.trust,
    )
    baselines.check()
    with lock_folder(
        out, f"Another process trains baselines in {out} right now: wait, or choose another --out.", "--out"
    ):
        found = _work(baselines, study, report, args.texts, suites)
        report.write_page(baselines, found, out / PAGE)
    if args.json:
        print_json(found | {"out": str(out)})
    else:
        console = Console()
        console.print(_table(found))
        for sentence in found["verdicts"]:
            console.print(sentence, soft_wrap=True, highlight=False)
        console.print(f"Written: {out / PAGE}", soft_wrap=True, highlight=False)
    return 0


def _work(baselines: Any, study: Any, report: Any, texts: int, suites: Any) -> dict[str, Any]:
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    baselines.write_settings()
    with resumable():
        minutes = baselines.seconds() / 60
        trials = len(baselines.rates) if len(baselines.rates) > 1 else 0
        say(
            f"About {minutes:,.0f} minutes of training, scoring apart: {len(study.MODELS)} models, for each {trials} "
            f"rates at {baselines.share:g} of the budget and {len(baselines.seeds)} trainings of all of it. The same "
            f"command goes on where it was interrupted."
        )
        for model in study.MODELS:
            say(f"{model}: the best of {', '.join(f'{rate:g}' for rate in baselines.rates)} times the recipe's rate")
            rate = baselines.best_rate(model)
            for seed in baselines.seeds:
                say(f"{model}: seed {seed}, {rate:g} times the recipe's rate")
                baselines.figures(model, seed)
        say("texts and tables")
        found: dict[str, Any] = report.summary(baselines, texts, suites)
        return found


def _table(found: dict[str, Any]) -> Table:
    title = f"nats per token of the test split; {found['match']} equal ({found['budget']})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("model", no_wrap=True)
    for head in ("seed", "rate", "nats/token", "± s.e.", "iwae", "", "parameters"):
        table.add_column(f" {head}", justify="right")
    for row in found["rows"]:
        figures = (row["nats_per_token"], row["stderr"], row["iwae"])
        cells = (f" {x:.4f}" if x is not None else " -" for x in figures)
        kind = " exact" if row["exact"] else " a bound"
        table.add_row(row["model"], f" {row['seed']}", f" {row['rate']:g}", *cells, kind, f" {row['parameters']:,}")
    return table
