"""All or nothing: a pack is written beside its destination and moved there when it is complete."""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltm_pyro.contracts import UsageError
from ltm_pyro.data.manifest import MANIFEST, TOKENIZER

_PACKED = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|(train|val)-\d+\.tar")


@contextmanager
def staged(out: str | Path, force: bool) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``out`` if the block succeeds and vanishes if it fails.

    Raises `UsageError` if ``out`` cannot be written, or exists: an empty folder is taken, a pack is replaced under
    ``force``, anything else is never touched.
    """
    out = Path(out).resolve()
    staging = None
    try:
        _check_free(out, force)
        # in the nearest existing folder above: on the same file system, so that the move is one rename
        home = next(parent for parent in out.parents if parent.exists())
        staging = home / f".{out.name}.{secrets.token_hex(4)}.partial"
        staging.mkdir()
        yield staging
        _check_free(out, force)
        _move(staging, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; make room there or choose another --out.") from error
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)


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
    """Puts ``staging`` in the place of ``out``; an old pack is deleted last, and put back if the move fails."""
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
