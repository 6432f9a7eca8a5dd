"""Files and folders that users name: refused in one sentence where they cannot be written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltm_pyro.errors import UsageError


@contextmanager
def writing(place: Path, option: str = "--out") -> Iterator[None]:
    """`UsageError` where ``place``, which ``option`` names, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"Cannot write {place}: {error.strerror}; choose another {option}.") from None


def check_folder(folder: Path, option: str) -> None:
    """Refuses a folder that ``option`` names and nobody could make."""
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{folder} is no folder that can be written, for {above} is not: choose another {option}.")
