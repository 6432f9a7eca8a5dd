"""Writing files that users name: whole or not at all, and an `OSError` becomes a `UsageError`."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ltm_pyro.errors import UsageError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, to be written inside the block; it replaces ``path`` when the block ends.

    Readers find the old file or the new one, never a part of it. If the block raises, the temporary file (or folder) is
    removed and ``path`` stays as it was. Every call has a temporary name of its own, so that several processes may
    write the same file at the same time. `os.replace` does not replace a folder: remove an old one inside the block.
    """
    name = path.name if len(os.fsencode(path.name)) < 200 else path.name[:40]  # file systems limit it to 255 bytes
    temporary = path.with_name(f"{name}.{uuid.uuid4().hex[:12]}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def remove(path: Path) -> None:
    """Deletes a file or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(place: str | Path, option: str = "--out") -> Iterator[None]:
    """Turns an `OSError` inside the block into a `UsageError` that names ``place`` and the ``option`` to change."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"Cannot write {place}: {reason}; make room there or choose another {option}.") from None


def check_folder(folder: Path, option: str) -> None:
    """Raises `UsageError` if the folder that ``option`` names could not be created or written."""
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(
            f"{folder} cannot be written, because {above} is no folder or is read-only: choose another {option}."
        )
