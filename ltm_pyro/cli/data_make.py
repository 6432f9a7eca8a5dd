"""`ltm data make TASK --out DIR`: sequences of a task whose optimum is known, or problems with answers, as a pack."""

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rich import box
from rich.table import Table

from ltm_pyro.cli.arguments import Help, Parser, add_seed, at_least
from ltm_pyro.cli.data import described, summary
from ltm_pyro.data.make import OPTIMUM, Made, make_problems, make_task
from ltm_pyro.data.tasks import TASKS, ProblemTask, Task
from ltm_pyro.errors import UsageError
from ltm_pyro.training.plugins import IN_FILE, import_file
from ltm_pyro.utils.as_json import print_json
from ltm_pyro.utils.console import Console

_MOST = 5_000_000  # sequences, which are held in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm data make` to ``parser``; those of the task are read when it is known."""
    about = f"{', '.join(sorted(TASKS))}, or FILE.py:NAME of your own; `ltm data make TASK --help` has its options"
    parser.add_argument("task", metavar="TASK", help=about)
    about = "options of the task, and those below"
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS", help=about).required = False
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder to create")
    about = "sequences, those of all splits together"
    parser.add_argument("--sequences", type=at_least(1, _MOST), default=50_000, metavar="N", help=about)
    about = "numbers R: what is best for a model whose tokens see the R before them is kept with each sequence"
    parser.add_argument("--reach", type=_reaches, metavar="R,…", help=f"{about} (default: 3,7); not for problems")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="F", help="share of sequences in val")
    parser.add_argument("--test-fraction", type=float, default=0.02, metavar="F", help="share of sequences in test")
    add_seed(parser, "random seed of the sequences and the splits")
    parser.add_argument("--force", action="store_true", help="replace an existing pack")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Makes the pack, prints a table or one JSON object; returns 0. Raises `UsageError`."""
    name, found = _find(args.task)
    parser = Parser(prog=f"ltm data make {args.task}", description=_about(found), allow_abbrev=False)
    parser.formatter_class = Help
    _add_common(parser)
    taken = {action.dest for action in parser._actions}
    parser.set_defaults(**{key: value for key, value in vars(args).items() if key in taken})
    own = _add_options(parser, name, found, taken)
    given = parser.parse_args(args.options)
    if not given.out:
        raise UsageError(f"the following arguments are required: --out; `ltm data make {args.task} --help` lists them.")
    options = {key: getattr(given, key) for key in own}
    task = found(**options)
    if not isinstance(task, Task | ProblemTask):
        raise UsageError(
            f"{args.task} gives {type(task).__name__}, which is no Task: inherit from Task or ProblemTask."
        )
    common: dict[str, Any] = {"about": {"name": name, "options": options}, "val_fraction": given.val_fraction}
    common |= {"test_fraction": given.test_fraction, "seed": given.seed, "force": given.force}
    if isinstance(task, ProblemTask):
        if given.reach:
            raise UsageError(f"{args.task} is of problems, of which no best within --reach is known: leave it out.")
        manifest = make_problems(task, given.out, given.sequences, **common)
        if given.json:
            print_json(summary(manifest, given.out) | {"sequences": given.sequences})
        else:
            splits = ", ".join(f"{split} {found.documents:,}" for split, found in manifest.splits.items())
            Console().print(
                f"{given.out}: {described(manifest)}, problems of at most {manifest.seq_len} tokens: {splits}"
            )
        return 0
    made = make_task(task, given.out, given.sequences, given.reach or (3, 7), **common)
    if given.json:
        nats = {key: cost._asdict() | {"per_token": cost.nats / task.length} for key, cost in made.costs.items()}
        print_json(summary(made.manifest, given.out) | {"sequences": given.sequences, "nats": nats})
    else:
        Console().print(_table(made, task, given.out))
    return 0


def _find(given: str) -> tuple[str, Callable[..., Any]]:
    """The name of a task, and what makes it; a file that the user names is imported."""
    if in_file := IN_FILE.fullmatch(given):
        module = sys.modules[import_file(Path(in_file["file"]))]
        if not callable(found := getattr(module, in_file["name"], None)):
            raise UsageError(f"{in_file['file']} has no class or function {in_file['name']!r}: name one that it has.")
        return in_file["name"], found
    if given not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise UsageError(f"There is no task {given[:40]!r}: choose {known}, or FILE.py:NAME of your own.")
    return given, TASKS[given]


def _about(found: Callable[..., Any]) -> str:
    return (inspect.getdoc(found) or "").partition("\nArgs:")[0].strip()


def _add_options(parser: Parser, name: str, found: Callable[..., Any], taken: set[str]) -> list[str]:
    """Adds an option for each argument of a task's constructor; its help is that of the docstring."""
    _, _, described = (inspect.getdoc(found) or "").partition("\nArgs:")
    abouts = dict(re.findall(r"^ +(\w+): (.*)$", described, re.MULTILINE))
    own = parser.add_argument_group(f"options of {name}")
    try:
        parameters = inspect.signature(found, eval_str=True).parameters
    except (ValueError, TypeError, NameError) as error:
        raise UsageError(
            f"The arguments of {name} cannot be read ({error}): name a class with annotated ones."
        ) from None
    for key, parameter in parameters.items():
        if key in taken:
            raise UsageError(f"The task {name} has an argument {key!r}, which is an option of every task: rename it.")
        flag, kind = f"--{key.replace('_', '-')}", parameter.annotation
        required = parameter.default is parameter.empty
        about = abouts.get(key, "").replace("%", "%%") or " "
        known: dict[str, Any] = {"dest": key, "help": about, "required": required}
        if not required:
            known["default"] = parameter.default
        if kind is bool:
            own.add_argument(flag, action=argparse.BooleanOptionalAction, **known)
        elif get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)):
            own.add_argument(flag, choices=get_args(kind), **known)
        elif kind in _TYPES:
            own.add_argument(flag, type=_TYPES[kind], metavar=_METAVARS[kind], **known)
        else:
            raise UsageError(
                f"The task {name} has an argument {key!r} that no option can be made of: annotate it as int, float, "
                f"bool, str or a Literal of words."
            )
    return list(parameters)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")
    return value


def _reaches(text: str) -> tuple[int, ...]:
    return tuple(sorted({at_least(1)(part) for part in text.split(",")}))


def _whole(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
    return int(text)


_TYPES: dict[Any, Callable[[str], Any]] = {int: _whole, float: _number, str: str}
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _table(made: Made, task: Task, out: str) -> Table:
    splits = ", ".join(f"{name} {split.sequences:,}" for name, split in made.manifest.splits.items())
    title = f"{out}: {described(made.manifest)}, sequences of {task.length} tokens out of {task.vocabulary}: {splits}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("best prediction", no_wrap=True)
    for column in ("nats/sequence", "± s.e.", "nats/token", "above optimum", "± s.e."):
        table.add_column(f" {column}", justify="right", no_wrap=True)
    for name, cost in made.costs.items():
        above = (f"{cost.excess:.3f}", f"{cost.excess_stderr:.3f}") if name != OPTIMUM else ()
        table.add_row(name, f"{cost.nats:.3f}", f"{cost.stderr:.3f}", f"{cost.nats / task.length:.4f}", *above)
    return table
