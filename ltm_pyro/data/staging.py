"""A pack is written into a staging folder, and moved to its destination when it is complete.

An interrupted pack is resumed: the same command continues after the last complete shard.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ltm_pyro.data.manifest import MANIFEST, SPLITS, TOKENIZER
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import check_folder, local_path, writing

_PACKED = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|({'|'.join(SPLITS)})-(\d+\.tar|lengths\.npy)|journal\.jsonl"
)
_JOURNAL = "journal.jsonl"  # the settings on the first line, then one line for each finished shard


class Staging:
    """The folder that a pack is written into, and ``entries``: the journal's lines, one for each finished shard."""

    def __init__(self, folder: Path, journal: TextIO, settings: dict[str, Any]) -> None:
        self.folder, self._journal = folder, journal
        lines = _whole_lines(journal)
        known = lines[:1] == [settings] and all(_is_there(folder, entry["shard"]) for entry in lines[1:])
        self.entries = lines[1:] if known else []
        kept = {_JOURNAL, *([TOKENIZER] if known else []), *(entry["shard"]["file"] for entry in self.entries)}
        for path in folder.iterdir():
            if path.name not in kept:  # another pack's, or what a killed process has not finished
                path.unlink()
        journal.seek(0)
        text = journal.read()
        journal.truncate(len(text[: text.rfind("\n") + 1].encode()) if known else 0)  # the last line may be cut off
        if not known:
            self._write(settings)

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a finished shard to the journal."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()


@contextmanager
def staged(out: str | Path, force: bool, settings: dict[str, Any]) -> Iterator[Staging]:
    """A folder to write into, which becomes ``out`` if the block succeeds.

    If the block raises `UsageError`, the folder is removed. After any other error or interruption it stays as soon as
    one shard is finished, and the next pack to ``out`` with the same ``settings`` continues from there. Raises
    `UsageError` if ``out`` cannot be written or exists already: an empty folder is used, a pack is replaced under
    ``force``, anything else is never changed.
    """
    out, staging = local_path(out, "--out").resolve(), None
    try:
        _check_free(out, force)
        with _journal(_folder(out), out) as journal:
            try:
                staging = Staging(_folder(out), journal, settings)
            except OSError:
                if not any(_folder(out).glob("*.tar")):  # otherwise finished shards are in there
                    shutil.rmtree(_folder(out), ignore_errors=True)
                raise
            yield staging
            _check_free(out, force)
            _move(staging.folder, out)
            (out / _JOURNAL).unlink()
    except BaseException as error:
        done = len(staging.entries) if staging and not isinstance(error, UsageError) else 0
        if staging and not done:
            shutil.rmtree(staging.folder, ignore_errors=True)
        goes_on = f" {done} shards are finished: the same command goes on from there." if done else ""
        if isinstance(error, OSError):
            raise UsageError(
                f"cannot write {out}: {error.strerror}; make room there or choose another --out.{goes_on}"
            ) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted.{goes_on}") from None
        raise


def check_out(out: str | Path, force: bool) -> None:
    """Raises the `UsageError` of `staged` that can be known before anything is computed; nothing is written."""
    out = local_path(out, "--out").resolve()
    with writing(out):
        _check_free(out, force)
        check_folder(out.parent, "--out")


def _folder(out: Path) -> Path:
    """The staging folder, in the nearest existing parent of ``out``: on the same file system, so it can be renamed."""
    home = next(parent for parent in out.parents if parent.exists())
    return home / f".{out.name}.{hashlib.sha256(os.fsencode(out)).hexdigest()[:8]}.partial"


@contextmanager
def _journal(folder: Path, out: Path) -> Iterator[TextIO]:
    """The journal, locked by this process until it ends, even if it is killed."""
    folder.mkdir(exist_ok=True)
    with (folder / _JOURNAL).open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is packing to {out} right now; wait for it or choose another --out."
            ) from None
        yield journal


def _whole_lines(journal: TextIO) -> list[Any]:
    """The journal's complete lines; a last line that was cut off is ignored."""
    journal.seek(0)
    lines = journal.read().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _is_there(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["size"]


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file, which even --force does not replace; choose another --out.")
    names = sorted(path.name for path in out.iterdir())
    if names and MANIFEST not in names:
        raise UsageError(f"{out} exists and is not a pack, so even --force does not replace it; choose another --out.")
    if names and not force:
        raise UsageError(f"{out} already holds a pack; give --force to replace it or choose another --out.")
    if foreign := [name for name in names if not _PACKED.fullmatch(name)]:
        raise UsageError(f"{out} holds {foreign[0]!r} besides its pack, which --force would delete; move it elsewhere.")


def _move(staging: Path, out: Path) -> None:
    """Renames ``staging`` to ``out``; an old pack is deleted last, and restored if the rename fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        staging.rename(out)
        return
    old = staging.with_suffix(".old")
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
