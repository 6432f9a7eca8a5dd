"""`ltm evaluate RUN`: scores held-out text by several estimators, or computes the suites of the paper's table."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from ltm_pyro.cli.arguments import add_device, add_seed, add_trust, add_workers, at_least
from ltm_pyro.cli.context import context_table
from ltm_pyro.cli.posterior import check_out
from ltm_pyro.data.manifest import SPLITS
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.estimators import AVERAGES, DEFAULT, ESTIMATORS, check_estimators
from ltm_pyro.inference.scores import Evaluation, Rate
from ltm_pyro.utils.as_json import finite, print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import atomic_write

if TYPE_CHECKING:
    from ltm_pyro.evaluation.documents import Exact

# options that have an effect only without or only with --suite, and their defaults
OF_ESTIMATORS: dict[str, Any] = {
    "data": None,
    "split": "val",
    "score": None,
    "observe": None,
    "by_document": None,
    "estimators": ",".join(DEFAULT),
    "block": 16,
    "normaliser": None,
    "temperatures": 32,
    "starts": None,
    "floor": None,
    "ceiling": None,
}
CONVERGED = {None: "", True: "yes", False: "not yet"}
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
    about = "of packed data: val, train, test or harder (of problems); how often test was scored is kept in the run"
    parser.add_argument("--split", metavar="NAME", choices=SPLITS, help=about)
    about = (
        "of documents with a prompt: score `all` or the `completion`; by default as in training, of other data `all`"
    )
    parser.add_argument("--score", choices=("all", "completion"), help=about)
    about = "of documents with a prompt: fit q to `all` or to the `prompt`; by default as --score"
    parser.add_argument("--observe", choices=("all", "prompt"), help=about)
    about = "write the figures of each document, one JSON object per line, with its id and labels"
    parser.add_argument("--by-document", type=Path, metavar="FILE", help=about)
    parser.add_argument("--estimators", metavar="A,B,…", help=f"any of {', '.join(ESTIMATORS)}")
    parser.add_argument(
        "--samples",
        type=numbers,
        default="16",
        metavar="S,…",
        help="draws per sequence after the fit; several: a curve",
    )
    parser.add_argument(
        "--fast-steps", type=at_least(0), metavar="N", help="fast steps per fit; by default the recipe's"
    )
    about = (
        "fits of q per sequence, of which the best is kept; by default the recipe's, else 8 if the prior is a mixture"
    )
    parser.add_argument("--starts", type=at_least(1), metavar="N", help=about)
    parser.add_argument(
        "--block", type=at_least(1), metavar="N", help="tokens per block of `causal` and `causal_prior`"
    )
    parser.add_argument(
        "--temperatures", type=at_least(1), metavar="N", help="distributions between q and the posterior, for `ais`"
    )
    parser.add_argument(
        "--normaliser",
        type=at_least(2),
        metavar="N",
        help="draws for an estimate of the normaliser of an unnormalised prior",
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N sequences; a document that this cuts is marked"
    )
    about = "the same network with constant thoughts (`constant_thoughts`), for the context recovered; several: seeds"
    parser.add_argument("--floor", nargs="+", metavar="RUN", help=about)
    about = "the floor with full attention (`window` is `length`); several: seeds"
    parser.add_argument("--ceiling", nargs="+", metavar="RUN", help=about)
    add_seed(parser)
    add_device(parser)
    add_workers(parser)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    suites = parser.add_argument_group("suites: the paper's evaluation table")
    suites.add_argument(
        "--suite", metavar="A,B,…", help="any of zero-shot, multilingual, gsm8k, reasoning, reconstruction, generation"
    )
    suites.add_argument("--suite-dir", type=Path, metavar="DIR", help="folder with the data sets")
    suites.add_argument(
        "--source", action="append", metavar="NAME=PLACE", help="file or folder of one data set; can be repeated"
    )
    suites.add_argument("--baseline", metavar="RUN", help="an autoregressive run to compare with")
    suites.add_argument("--shots", type=at_least(0), metavar="N", help="worked examples of gsm8k, if they fit")
    about = "generated answers per question of gsm8k; the most drafts, and iterations of rethinking, of reasoning"
    suites.add_argument("--attempts", type=at_least(1), metavar="N", help=about)
    suites.add_argument("--features", metavar="DIR", help="run or Hugging Face model for MAUVE's features")
    suites.add_argument("--out", type=Path, metavar="DIR", help="results and report; by default RUN/suites")
    suites.add_argument(
        "--force", action="store_true", help="replace results of other settings, or the file of --by-document"
    )
    parser.set_defaults(**OF_ESTIMATORS, **OF_SUITES)


def run(args: argparse.Namespace) -> int:
    """Scores the run and prints a table or one JSON object; returns 0."""
    _check(args)
    if args.suite:
        return _suites(args)
    estimators = args.estimators.split(",")
    check_estimators(estimators)
    if len(args.samples) > 1 and not args.json and not {*estimators} & {*AVERAGES}:
        raise UsageError(
            f"{', '.join(estimators)} would have no curve, which is of {', '.join(AVERAGES)}: give one number."
        )
    from ltm_pyro.evaluation.context import NULLS, context_recovered, known_references
    from ltm_pyro.evaluation.documents import check_documents, document_scores, exact_figure
    from ltm_pyro.evaluation.evaluate import evaluate_run, record_test_use, scored_and_observed
    from ltm_pyro.runs.load import load_run
    from ltm_pyro.utils.parallel import all_cores

    trained = load_run(args.run, args.device, args.trust)
    others = [[load_run(path, args.device, args.trust) for path in paths or ()] for paths in (args.floor, args.ceiling)]
    if args.by_document:
        args.by_document = check_out(args.by_document, args.force, "--by-document", [args.data])
    if args.by_document or args.floor:
        check_documents(args.data or trained.data)
    if args.floor:
        for path, other in zip((*args.floor, *args.ceiling), (x for runs in others for x in runs), strict=True):
            if other.model.decoder.thought_shape.thoughts:
                raise UsageError(f"{path} has thoughts, but floor and ceiling have none: train them with `thoughts` 0.")
        estimators += [name for name in NULLS if name not in estimators]
    score, observe = scored_and_observed(trained, args.data, args.score, args.observe)
    of_figures = {"limit": args.limit, "seed": args.seed, "split": args.split, "score": score, "observe": observe}
    of_figures["workers"] = args.workers or all_cores(trained.device)
    evaluation = evaluate_run(
        trained,
        args.data,
        estimators,
        args.samples,
        args.fast_steps,
        block=args.block,
        normaliser=args.normaliser,
        temperatures=args.temperatures,
        starts=args.starts,
        **of_figures,
    )
    uses = record_test_use(Path(args.run), args.data or trained.data) if args.split == "test" else None
    exact = exact_figure(evaluation, trained.reach) if score == "all" else None  # it is that of the whole sequence
    is_task = exact is not None and bool(exact.beyond) and not evaluation.excluded
    needed = args.by_document or args.floor or is_task
    documents = [x.as_dict() for x in document_scores(evaluation)] if needed else []
    if args.by_document:
        with atomic_write(args.by_document) as new:
            lines = (json.dumps(finite(found), ensure_ascii=False) + "\n" for found in documents)
            new.write_text("".join(lines), "utf-8")
    context, names = None, ("floor", "ceiling")
    if args.floor:
        place = args.data or trained.data
        scored = [[evaluate_run(run, place, ["bound"], 1, **of_figures) for run in runs] for runs in others]
        floors, ceilings = ([[x.as_dict() for x in document_scores(found)] for found in runs] for runs in scored)
        context = context_recovered([documents], floors, ceilings, [*evaluation.estimates])
    elif is_task:
        names = (f"best within {trained.reach}", "exact")
        best, optimum = known_references(documents, trained.reach)
        context = context_recovered([documents], [best], [optimum], [*evaluation.estimates])
    if args.json:
        found = evaluation.as_dict() | {"split": args.split, "score": score, "observe": observe}
        of_exact = exact and {"rate": asdict(exact.rate)} | {
            field: {str(key): asdict(x) for key, x in getattr(exact, field).items()}
            for field in ("excess", "best_within", "beyond")
        }
        found |= {"exact": of_exact, "reach": trained.reach, "context": context and context.as_dict()}
        print_json(found | {"test_uses": uses})
    else:
        console = Console()
        console.print(_table(evaluation, args.run, exact, trained.reach))
        if context:
            console.print(context_table(context, trained, names))
        if not score == observe == "all":
            console.print(f"Scored: {score}. Observed by q: {observe}.")
        if len(args.samples) > 1 and any(score.curve for score in evaluation.estimates.values()):
            console.print(_curve(evaluation))
        if uses is not None:
            console.print(f"This is the test split, which this run has scored {_times(uses)}.")
    return 0


def _times(uses: int) -> str:
    return "once" if uses == 1 else f"{uses or 'an unknown number of'} times"


def numbers(text: str) -> list[int]:
    """One or more whole numbers above 0, separated by commas."""
    return [at_least(1)(part) for part in text.split(",")]


def _check(args: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    ignored = OF_ESTIMATORS if args.suite else OF_SUITES
    given = [f"--{name.replace('_', '-')}" for name, default in ignored.items() if getattr(args, name) != default]
    if args.by_document and "--force" in given:
        given.remove("--force")
    if bool(args.floor) != bool(args.ceiling):
        raise UsageError("The context recovered lies between --floor and --ceiling: give both.")
    if given and args.suite:
        raise UsageError(f"The suites choose their own data and estimators: leave out {', '.join(given)}.")
    if given:
        raise UsageError(f"Without --suite {', '.join(given)} would have no effect: name a suite, or leave that out.")


def _suites(args: argparse.Namespace) -> int:
    from ltm_pyro.evaluation.suites.suite import Options
    from ltm_pyro.evaluation.suites.table import evaluate_suites, markdown
    from ltm_pyro.utils.parallel import all_cores

    options = Options(
        directory=args.suite_dir,
        sources=_sources(args.source),
        limit=args.limit,
        samples=max(args.samples),
        fast_steps=args.fast_steps,
        seed=args.seed,
        shots=args.shots,
        attempts=args.attempts,
        features=args.features,
        judge=args.baseline,
        trust=args.trust,
        workers=args.workers or all_cores(args.device),
    )
    run = Path(args.run)
    out = args.out or (run if run.is_dir() else run.parent) / "suites"
    content = evaluate_suites(args.run, args.suite.split(","), options, out, args.baseline, args.force, args.device)
    print_json(content) if args.json else print(markdown(content))
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


def _curve(evaluation: Evaluation) -> Table:
    """Nats per token by the number of draws and by what they cost, for every estimator that averages over draws."""
    curves = {name: score.curve for name, score in evaluation.estimates.items() if score.curve}
    table = Table("draws", title="nats/token by draws", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for name, curve in curves.items():
        table.add_column(f" {name}", justify="right", overflow="fold")
        table.add_column("± s.e.", justify="right")
        if next(iter(curve.values())).passes is not None:
            table.add_column("passes", justify="right")
    for samples in next(iter(curves.values())):
        points = [curve[samples] for curve in curves.values()]
        cells = [
            (_figure(x.nats_per_token), _figure(x.stderr_nats_per_token), None if x.passes is None else f"{x.passes:,}")
            for x in points
        ]
        table.add_row(f"{samples:,}", *(cell for row in cells for cell in row if cell is not None))
    if any(point.passes is not None for curve in curves.values() for point in curve.values()):
        table.caption = (
            "A pass is a sequence through the decoder, forward with one z or back to it; an encoder is none."
        )
    return table


def _table(evaluation: Evaluation, title: str, exact: "Exact | None", reach: int | None) -> Table:
    e = evaluation
    what = f"{e.sequences:,} sequences" + (f" ({_documents(e)})" if e.documents else "")
    title = f"{title}: {what}, {e.tokens:,} tokens, {e.bytes:,} bytes"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("estimator", no_wrap=True)
    for column in ("nats/token", "± s.e.", "perplexity", "bits/byte", "KL/token", "bound?", "settled?"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, s in e.estimates.items():
        figures = (s.nats_per_token, s.stderr_nats_per_token, s.perplexity, s.bits_per_byte, s.kl_nats_per_token)
        table.add_row(name, *map(_figure, figures), "yes" if s.is_bound else "no", CONVERGED[s.converged])
        if exact:
            above = exact.excess[name]
            table.add_row("  - exact", _figure(above.nats_per_token), _figure(above.stderr_nats_per_token))
            if beyond := exact.beyond.get(name):
                cells = _figure(beyond.nats_per_token), _figure(beyond.stderr_nats_per_token)
                table.add_row(f"  - best within {reach}", *cells)
    for name, rate in _known(exact).items():
        table.add_row(name, _figure(rate.nats_per_token), _figure(rate.stderr_nats_per_token))
    if e.predictive_gain:
        gain = (e.predictive_gain.nats_per_token, e.predictive_gain.stderr_nats_per_token)
        table.add_row("predictive gain", *map(_figure, gain))
    elif e.shorter_than_a_block:
        table.add_row("predictive gain", "-")
    reasons = [f"{name}: unavailable, because {reason}." for name, reason in e.unavailable.items()]
    if e.shorter_than_a_block:
        reasons.insert(
            0, f"{e.shorter_than_a_block:,} sequences are no longer than a block and have no gain: lower --block."
        )
    if e.excluded:
        reasons.insert(0, f"{len(e.excluded)} sequences have no finite score and are in no figure.")
    if e.worse_than_prior:
        reasons.insert(0, e.worse_than_prior)
    if exact and exact.best_within and reach:
        reasons.append(f"Best within r: knowing the r tokens before. A token of this run sees {reach}.")
    if any(s.converged is False for s in e.estimates.values()):
        reasons.append("Settled: k-hat is low or AIS agrees, which takes 25 draws at least: --samples 64 or more.")
    errors = {name: s.monte_carlo_stderr for name, s in e.estimates.items() if s.monte_carlo_stderr is not None}
    reasons += [f"Of the error of {name}, {_figure(x)} is that of its draws." for name, x in errors.items()]
    if 1 in (e.documents, e.sequences):
        reasons.append("One document has no standard error, because its pieces are not independent of each other.")
    table.caption = " ".join(reasons) or None
    return table


def _known(exact: "Exact | None") -> dict[str, Rate]:
    """The figures that no model is below on average, by name."""
    if exact is None:
        return {}
    return {f"best within {r}": rate for r, rate in exact.best_within.items()} | {"exact": exact.rate}


def _documents(evaluation: Evaluation) -> str:
    count = evaluation.documents
    return f"{count:,} document{'s' * (count != 1)}" + (", the last one cut by --limit" if evaluation.cut else "")


def _figure(x: float) -> str:
    return f"{x:.4f}" if math.isfinite(x) else "-"
