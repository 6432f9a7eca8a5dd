"""Shared parts of the commands' argument parsers: number types, errors of one sentence, defaults in the help."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ltm_pyro.cli.old_options import RENAMED
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.limits import LARGEST_SEED


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UsageError` instead of printing its usage."""

    def print_help(self, file: Any = None) -> None:
        """Prints the help; argparse's own says nothing where it cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raises; ``message`` names the argument and its value."""
        if renamed := [f"`{old}` is now `{new}`" for old, new in RENAMED.items() if re.search(rf"{old}\b", message)]:
            raise UsageError(f"{', '.join(renamed)}: use the new name.")
        raise UsageError(f"{message}; `{self.prog} --help` lists the options.")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to the help of every option that has one and does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        if default is None or default is False or default in ([], (), "") or "default" in text:
            return action.help
        return super()._get_help_string(action)


LARGEST = 2**31 - 1  # a count beyond it is a slip, and would never end


def at_least(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """An argument type: whole numbers from ``low`` to ``high``, in the digits 0 to 9."""

    def parse(text: str) -> int:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        if not re.fullmatch("-?[0-9]{1,4000}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number of at least {low}")
        if int(text) > high:
            raise argparse.ArgumentTypeError(f"{shown!r} is more than {high}, the largest that is taken")
        return int(text)

    return parse


def names(text: str) -> tuple[str, ...]:
    """An argument type: names between commas."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name between its commas")
    return found


def positive(text: str) -> float:
    """An argument type: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds ``--trust``."""
    about = "import and execute code that is not ltm_pyro's, and read data anywhere, if asked to; lists the code first"
    parser.add_argument("--trust", action="store_true", help=about)


def add_seed(parser: argparse.ArgumentParser, about: str = "random seed") -> None:
    """Adds ``--seed``; ``about`` says of what."""
    parser.add_argument("--seed", type=at_least(0, LARGEST_SEED), default=0, metavar="N", help=about)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds ``--workers``; None stands for `all_cores`."""
    about = "processes that share the work; by default one for every core that torch may use, 1 with CUDA"
    parser.add_argument("--workers", type=at_least(1), metavar="N", help=about)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""

    def device(text: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
        return text

    about = "where the model runs: cpu, cuda or cuda:N"
    parser.add_argument("--device", type=device, default="cpu", metavar="NAME", help=about)
