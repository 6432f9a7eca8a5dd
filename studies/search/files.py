"""Where the recipes that come with the studies are, and what is said where a file cannot be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from ltm_pyro.contracts import UsageError


def recipe_file(name: str) -> str:
    """The path of a shipped recipe."""
    return str(files("ltm_pyro.studies") / "recipes" / name)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """`UsageError` where ``place`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"Cannot write {place}: {error.strerror}; choose another --out.") from None


def check_folder(folder: Path, option: str) -> None:
    """Refuses a folder that ``option`` names and nobody could make."""
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{folder} is no folder that can be written, for {above} is not: choose another {option}.")
