"""Files that users name: read in one way, written whole or not at all, and an `OSError` becomes a `UsageError`."""

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ltm_pyro.errors import UsageError

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK = ".lock"  # in a folder that a process has for itself
_PATIENCE = 2.0  # seconds that a lock is waited for: a killed process's workers end after it


def local_path(given: str | Path, option: str) -> Path:
    """The absolute path of a file or folder that ``option`` names; ``~`` is the user's home, as in a shell.

    Libraries that we give such a path to have rules of their own for ``~`` and for names that look like addresses; an
    absolute path means the same to all of them. `UsageError` if there is no such home, or for a name with ``::``, which
    fsspec takes for two addresses, one inside the other.
    """
    try:
        path = Path(given).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"{option} {given} is in the home of a user who is not here: write the path out.") from None
    if "::" in str(path):
        raise UsageError(f"{option} {path} has '::', which stands between two addresses: choose a name without it.")
    return path


class DiskFullError(UsageError):
    """There is no room for what has to be written: the same command succeeds once there is."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, to be written inside the block; it replaces ``path`` when the block ends.

    Readers find the old file or the new one, never a part of it. If the block raises, the temporary file (or folder) is
    removed and ``path`` stays as it was. Every call has a temporary name of its own, so that several processes may
    write the same file at the same time. A file is on the disk before it has its name, so that a power failure does
    not cut it. `os.replace` does not replace a folder: remove an old one inside the block. Raises `UsageError` for a
    device or a named pipe, which would be replaced by a file.
    """
    _check_ordinary(path)
    temporary = _temporary(path)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def _check_ordinary(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path} is a device or a pipe, and no place for a file: choose another.")


def _temporary(path: Path) -> Path:
    name = path.name if len(os.fsencode(path.name)) < 200 else path.name[:40]  # file systems limit it to 255 bytes
    return path.with_name(f"{name}.{uuid.uuid4().hex[:12]}.new")


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """A folder, with those above it. If the block raises, a folder that was not there before is removed again.

    What the block wrote into such a folder goes with it; folders above it stay if anything else has come into them.
    """
    missing = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if missing:
            shutil.rmtree(folder, ignore_errors=True)
            remove_empty(missing[1:])
        raise


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.absolute().parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Deletes folders, the innermost first, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def lock_folder(folder: Path, busy: str, option: str) -> Iterator[None]:
    """A folder, created if it is missing, that no other process has locked; it is unlocked even if this one is killed.

    A folder that is empty at the end is removed again, if it was not there before. Raises `UsageError` with the
    sentence ``busy`` if another process has the lock, and if the folder that ``option`` names cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder: choose another {option}.")
    missing = missing_folders(folder)
    try:
        with writing(folder, option):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(folder / _LOCK, busy)
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_UN)  # explicitly, because a worker process may have inherited the file
            lock.close()
    finally:
        remove_empty(missing)


def _take_lock(path: Path, busy: str) -> IO[bytes]:
    until = time.monotonic() + _PATIENCE
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file  # otherwise the holder has deleted it since it was opened
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise UsageError(busy) from None
            time.sleep(0.1)
        file.close()


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
        reason, kind = error.strerror or error, DiskFullError if error.errno in DISK_IS_FULL else UsageError
        raise kind(f"Cannot write {place}: {reason}; make room there or choose another {option}.") from None


def check_folder(folder: Path, option: str) -> None:
    """Raises `UsageError` if the folder that ``option`` names could not be created or written; nothing is created."""
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    trial = _temporary(above / "folder")
    try:
        trial.touch()  # because permissions do not tell of a file system that is read-only or full
        trial.unlink()
    except OSError:
        raise UsageError(
            f"{folder} cannot be written, because {above} is no folder or is read-only: choose another {option}."
        ) from None


def check_file(path: Path, option: str) -> None:
    """Raises `UsageError` if the file that ``option`` names could not be written in its folder; nothing is written."""
    with writing(path, option):
        _check_ordinary(path)  # which fails for a name that is too long
        trial = _temporary(path)
        trial.touch()
        trial.unlink()
