"""`ltm study run|list|show|report|best|enqueue|rename|delete`: which setting is best at a fixed budget?"""

import argparse
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from ltm_pyro.cli.arguments import add_seed, add_trust, at_least, positive
from ltm_pyro.cli.resumable import resumable
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import local_path
from ltm_pyro.utils.safe_yaml import load_yaml

SEARCH = "ltm_pyro.studies.search"  # by dotted path: the command line imports no study
STORAGE = "sqlite:///runs/studies.db"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm study …`; the parser's name says which."""
    command = parser.prog.split()[-1]
    _ARGUMENTS[command](parser)
    parser.set_defaults(command=command)
    kinds = "sqlite:///FILE, journal:///FILE, postgresql+psycopg://…, grpc://HOST:PORT"
    about = f"of the trials: {kinds}; {STORAGE} by default"
    parser.add_argument("--storage", default=STORAGE, metavar="URL", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Does what the command says; returns 0. Raises `UsageError`."""
    return _COMMANDS[args.command](args)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "study",
        metavar="NAME|FILE.py",
        help="rate_ratio, latent_dims, inference_steps, prior_family, scaling, or a file",
    )
    add("--base-config", metavar="FILE", help="the recipe that is varied; the study's own by default")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe in all trials")
    about = "training of each trial: 2e13flops, 120s, 5m or 1h; 4e12flops by default"
    add("--budget", metavar="N[flops|s|m|h]", help=about)
    add("--trials", type=at_least(1), metavar="N", help="in total, over workers and restarts; 20, or the grid's")
    add("--workers", type=at_least(1), default=1, metavar="N", help="trials at a time on this machine")
    add("--study-name", metavar="S", help="its name in the storage; the study's by default")
    add("--minimise", metavar="A[,B]", help="figures to minimise, `bound` by default; several give a Pareto front")
    add("--maximise", metavar="A[,B]", help="figures to maximise, such as predictive_gain or context_recovered")
    add("--floor", metavar="RUN", help="of context_recovered, on text whose optimum is not known")
    add("--ceiling", metavar="RUN", help="the same with full attention")
    add("--at-most", action="append", default=[], metavar="FIGURE=X", help="a limit, such as peak_memory_mib=4000")
    add("--sampler", default="tpe", metavar="NAME", help="tpe, gp, cmaes, qmc, random, grid, nsga2 or nsga3")
    add("--prune", action="store_true", help="give up early on trials that are behind: --pruner hyperband")
    add("--pruner", default="none", metavar="NAME", help="none, median, hyperband, or wilcoxon over documents")
    add(
        "--repeats",
        type=at_least(0),
        default=5,
        metavar="N",
        help="other seeds that the best settings are trained with",
    )
    add("--finalists", type=at_least(1), default=4, metavar="N", help="settings that are, halved until two are left")
    add("--warm-start", metavar="S", help="try the five best points of another study of the storage first")
    add("--timeout", type=duration, metavar="N[s|m|h]", help="after it no further trial is started here")
    add("--trial-timeout", type=duration, metavar="N[s|m|h]", help="a trial that takes longer fails")
    add("--memory", type=positive, metavar="GIB", help="the most memory one trial may allocate")
    add("--samples", type=at_least(1), default=8, metavar="S", help="draws per sequence after q is final")
    add("--limit", type=at_least(2), default=64, metavar="N", help="score only the first N held-out sequences")
    add_seed(parser, "random seed of the search and of every training")
    add("--out", metavar="DIR", help="where the trials' runs go; runs/studies/S by default")
    add_trust(parser)


def _study_name_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study-name", metavar="S", help="its name in the storage; not needed if there is only one")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _study_name_argument(parser)
    about = "where the trials' runs are, for differences by document; runs/studies/S by default"
    parser.add_argument("--runs", type=Path, metavar="DIR", help=about)


def _best_arguments(parser: argparse.ArgumentParser) -> None:
    _study_name_argument(parser)
    parser.add_argument("--out", metavar="FILE", help="the recipe to write; S-best.yaml by default")
    parser.add_argument("--trial", type=at_least(0), metavar="N", help="this trial instead of the recommended one")
    parser.add_argument(
        "--pick", type=at_least(0), metavar="INDEX", help="this one of the Pareto front, as `show` lists it"
    )
    about = "of an objective; the trial of the Pareto front with the least weighted sum is taken"
    parser.add_argument("--weight", action="append", default=[], metavar="FIGURE=X", help=about)
    parser.add_argument("--force", action="store_true", help="replace the file")
    add_trust(parser)


def _run(args: argparse.Namespace) -> int:
    study = import_module(f"{SEARCH}.study")
    if args.study_name is not None:
        study.check_name(args.study_name)
    definition, plan = study.prepare(
        args.study,
        args.base_config,
        {key: _value(key, text) for key, text in _pairs("--set", args.set)},
        budget=args.budget,
        trust=args.trust,
        references=_references(args),
        minimise=_names(args.minimise if args.minimise is not None or args.maximise else "bound"),
        maximise=_names(args.maximise),
        at_most={figure: _number("--at-most", value) for figure, value in _pairs("--at-most", args.at_most)},
        samples=args.samples,
        limit=args.limit,
        sampler=args.sampler,
        pruner="hyperband" if args.prune and args.pruner == "none" else args.pruner,
        seed=args.seed,
    )
    name = args.study_name or plan.study
    resources = study.Resources(
        out=Path(args.out or study.RUNS / name).expanduser(),
        workers=args.workers,
        memory_gib=args.memory,
        trial_seconds=args.trial_timeout,
        seconds=args.timeout,
    )
    total = args.trials or len(definition.points) or study.TRIALS
    with resumable():
        study.run_study(
            definition, plan, args.storage, name, total, resources, args.repeats, args.finalists, args.warm_start
        )
    found = study.describe(args.storage, name, resources.out)
    _print(found, args.json)
    return 0 if any(row["state"] == "complete" for row in found["trials"]) else 2


def _names(given: str | None) -> tuple[str, ...]:
    return () if given is None else tuple(name.strip() for name in given.split(","))


def _references(args: argparse.Namespace) -> tuple[str, ...]:
    given = [place for place in (args.floor, args.ceiling) if place]
    if len(given) == 1:
        raise UsageError("--floor and --ceiling belong together: give both, or none on a task whose optimum is known.")
    return tuple(given)


def duration(text: str) -> float:
    """An argument type: seconds, from ``90s``, ``5m`` or ``2h``."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smh])", text)
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no time: write 90s, 5m or 2h")
    return seconds


def _pairs(option: str, given: list[str]) -> list[list[str]]:
    for text in given:
        if "=" not in text:
            raise UsageError(f"{option} {text!r} is not NAME=VALUE: write the name, an equals sign and the value.")
    return [text.split("=", 1) for text in given]


def _value(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--set {key} needs a value in YAML, got {text[:80]!r} ({reason}): correct it.") from None


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{option} needs a number, got {text!r}: for example peak_memory_mib=4000.")
    return value


def _list(args: argparse.Namespace) -> int:
    found = import_module(f"{SEARCH}.study").summaries(args.storage)
    if args.json:
        print_json(found)
        return 0
    table = Table("study", "trials", "complete", "failed", "pruned", "best", "budget", box=box.SIMPLE_HEAD)
    for row in found:
        table.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()))
    Console().print(table)
    return 0


def _show(args: argparse.Namespace) -> int:
    _print(import_module(f"{SEARCH}.study").describe(args.storage, args.study_name, _runs(args)), args.json)
    return 0


def _runs(args: argparse.Namespace) -> Path | None:
    return None if args.runs is None else local_path(args.runs, "--runs")


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    console = Console()
    console.print(_table(found))
    console.print(found["recommendation"], soft_wrap=True, highlight=False)


def _table(found: dict[str, Any]) -> Table:
    searched = [row for row in found["trials"] if row["role"] in ("trial", "added")]
    parameters = list(dict.fromkeys(name for row in searched for name in row["parameters"]))
    title = f"{found['study']}: {found['question']} Every trial trains for {found['each']}."
    short = [name.rsplit(".", 1)[-1] for name in parameters]
    objectives, front = [*found["minimise"], *found["maximise"]], found["front"]
    columns = ("trial", *short, *objectives, "above best", "± s.e.", "predictive gain", "")
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for row in found["trials"]:
        paired = [row.get(name) for name in ("above_best", "above_best_stderr")]
        figures = [*map(row["figures"].get, objectives), *paired, row["figures"].get("predictive_gain")]
        given = [row["parameters"].get(name) for name in parameters]
        is_searched = row in searched
        label = str(row["number"]) if is_searched else f"{row['role']} of {row['of']}"
        state = row["reason"] or row["state"]
        if is_searched and row["number"] in front:
            state += f", front {front.index(row['number'])}"
        table.add_row(label, *map(_cell, given), *map(_cell, figures), state)
    return table


def _cell(value: Any) -> str:
    return " " if value is None else f" {value:.4g}" if isinstance(value, float) else f" {value}"


def _best(args: argparse.Namespace) -> int:
    study, number = import_module(f"{SEARCH}.study"), args.trial
    if args.pick is not None:
        front = study.describe(args.storage, args.study_name)["front"]
        if args.pick >= len(front):
            raise UsageError(
                f"--pick is {args.pick}, and the front has {len(front)} trials: `ltm study show` lists them."
            )
        number = front[args.pick]
    weights = {figure: _number("--weight", value) for figure, value in _pairs("--weight", args.weight)}
    out = None if args.out is None else Path(args.out)
    written = study.write_best(args.storage, args.study_name, out, number, args.force, args.trust, weights)
    if args.json:
        print_json(written)
    else:
        print(
            f"Written: {written['recipe']}, from trial {written['number']}. Next: ltm fit --config {written['recipe']}"
        )
    return 0


def _enqueue_arguments(parser: argparse.ArgumentParser) -> None:
    _study_name_argument(parser)
    about = "a parameter of the point; the sampler chooses those that are left out"
    parser.add_argument("--set", action="append", default=[], required=True, metavar="NAME=VALUE", help=about)


def _enqueue(args: argparse.Namespace) -> int:
    point = {name: _value(name, text) for name, text in _pairs("--set", args.set)}
    number = import_module(f"{SEARCH}.manage").Study(args.storage, args.study_name).enqueue(point)
    return _say(args, {"trial": number}, f"Trial {number} waits; the next free worker takes it.")


def _rename_arguments(parser: argparse.ArgumentParser) -> None:
    _study_name_argument(parser)
    parser.add_argument("new", metavar="NEW", help="its new name")


def _rename(args: argparse.Namespace) -> int:
    import_module(f"{SEARCH}.manage").Study(args.storage, args.study_name).rename(args.new)
    return _say(args, {"study": args.new}, f"It is called '{args.new}' now.")


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study-name", metavar="S", required=True, help="its name in the storage")
    parser.add_argument("--force", action="store_true", help="also while trials run")


def _delete(args: argparse.Namespace) -> int:
    count = import_module(f"{SEARCH}.manage").Study(args.storage, args.study_name).delete(args.force)
    return _say(args, {"deleted": count}, f"Deleted, with {count} trials; their runs are where they were.")


def _say(args: argparse.Namespace, found: dict[str, Any], text: str) -> int:
    print_json(found) if args.json else print(text)
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _show_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write; S-report by default")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    add_trust(parser)


def _report(args: argparse.Namespace) -> int:
    out = None if args.out is None else Path(args.out)
    written = import_module(f"{SEARCH}.report").write_report(
        args.storage, args.study_name, out, args.force, args.trust, _runs(args)
    )
    if args.json:
        print_json(written)
    else:
        print(
            "\n".join(
                [*written["findings"], f"Written: {written['report']} and {len(written['files']) - 1} more files."]
            )
        )
    return 0


_ARGUMENTS = {
    "run": _run_arguments,
    "list": lambda parser: None,
    "show": _show_arguments,
    "report": _report_arguments,
    "best": _best_arguments,
    "enqueue": _enqueue_arguments,
    "rename": _rename_arguments,
    "delete": _delete_arguments,
}
_COMMANDS = {
    "run": _run,
    "list": _list,
    "show": _show,
    "report": _report,
    "best": _best,
    "enqueue": _enqueue,
    "rename": _rename,
    "delete": _delete,
}
