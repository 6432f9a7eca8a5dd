"""`ltm new prior|guide|study NAME`: a commented file to start from, with a test that passes."""

import argparse
import re
from importlib.resources import files
from pathlib import Path

from ltm_pyro.console import Console
from ltm_pyro.contracts import UsageError

TEMPLATES = files("ltm_pyro") / "templates"  # KIND.txt and KIND_test.txt; MyName and my_name stand for the user's


def kinds() -> list[str]:
    """What can be made new."""
    return sorted(x.name.removesuffix(".txt") for x in TEMPLATES.iterdir() if not x.name.endswith("_test.txt"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm new`."""
    parser.add_argument("kind", choices=kinds(), help="what to write")
    parser.add_argument("name", metavar="NAME", help="of the class or the study, such as SpikeAndSlab")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where; the current folder by default")


def run(args: argparse.Namespace) -> int:
    """Writes both files; returns 0."""
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", args.name).lower()
    title = "".join(part[:1].upper() + part[1:] for part in args.name.split("_"))
    if not title.isidentifier():
        raise UsageError(f"{args.name!r} is no name in Python: give one such as SpikeAndSlab.")
    written = {args.out / f"{module}.py": f"{args.kind}.txt", args.out / f"test_{module}.py": f"{args.kind}_test.txt"}
    for path in written:
        if path.exists():
            raise UsageError(f"{path} exists already: choose another NAME or --out.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for path, template in written.items():
            text = (TEMPLATES / template).read_text("utf-8")
            path.write_text(text.replace("MyName", title).replace("my_name", module), "utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write into {args.out}: {error.strerror}; choose another --out.") from None
    path, test = written
    use = f"study run {path}" if args.kind == "study" else f"fit … --model.{args.kind} {path}:{title}"
    Console(soft_wrap=True).print(f"Written: {path} and {test}. Try it: pytest {test}; then ltm {use}")
    return 0
