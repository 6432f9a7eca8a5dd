"""`ltm new prior|guide|study NAME`: writes a commented file to start from, and a test that passes."""

import argparse
import re
import shlex
from contextlib import ExitStack
from importlib.resources import files
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write, new_folder

TEMPLATES = files("ltm_pyro.cli") / "templates"  # KIND.txt and KIND_test.txt, in which MyName and my_name are replaced


def kinds() -> list[str]:
    """The kinds of files that can be written."""
    return sorted(x.name.removesuffix(".txt") for x in TEMPLATES.iterdir() if not x.name.endswith("_test.txt"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ltm new`."""
    parser.add_argument("kind", choices=kinds(), help="kind of file")
    parser.add_argument("name", metavar="NAME", help="name of the class or the study, such as SpikeAndSlab")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder; by default the current one")


def run(args: argparse.Namespace) -> int:
    """Writes the file and its test; returns 0."""
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", args.name).lower()
    title = "".join(part[:1].upper() + part[1:] for part in args.name.split("_"))
    templates = {name: (TEMPLATES / f"{name}.txt").read_text("utf-8") for name in (args.kind, f"{args.kind}_test")}
    path, test = written = (args.out / f"{module}.py", args.out / f"test_{module}.py")
    for file in written:
        if file.exists():
            raise UsageError(f"{file} exists already: choose another NAME or --out.")
    _check_name(args.name, module, title, "".join(templates.values()))
    try:
        with new_folder(args.out), ExitStack() as whole:
            for file, text in zip(written, templates.values(), strict=True):
                new = whole.enter_context(atomic_write(file))
                new.write_text(text.replace("MyName", title).replace("my_name", module), "utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write into {args.out}: {error.strerror}; choose another --out.") from None
    use = ["study", "run", path] if args.kind == "study" else ["fit", "…", f"--model.{args.kind}", f"{path}:{title}"]
    steps = (("python", "-m", "pytest", test), ("ltm", *use))
    tried, used = (" ".join(word if word == "…" else shlex.quote(str(word)) for word in step) for step in steps)
    print(f"Written: {path} and {test}. Try it: {tried}; then {used}")
    return 0


def _check_name(name: str, module: str, title: str, templates: str) -> None:
    """Refuses a name that cannot be used for the file, the module and the class."""
    if not name.isidentifier() or name.startswith("_") or iskeyword(module) or iskeyword(title):
        raise UsageError(f"{name!r} is no name for a file and a class in Python: give one such as SpikeAndSlab.")
    if re.search(rf"\b{title}\b", templates.replace("MyName", "")) or module.startswith(("test_", "conftest")):
        raise UsageError(f"{name!r} is a name that the new files or pytest use themselves: choose another NAME.")
    found = find_spec(module)
    if found and found.origin:
        raise UsageError(f"{name!r} would hide the module {module} ({found.origin}): choose another NAME.")
