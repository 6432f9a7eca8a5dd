"""What commands have in common that take long and go on where they stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import DiskFullError


@contextmanager
def resumable(out: Path | None = None) -> Iterator[None]:
    """Says after Ctrl-C, and of a full disk under ``out``, that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes where it stopped.") from None
    except DiskFullError:
        if out is None:
            raise
        raise UsageError(f"The disk under {out} is full: make room, and give the same command again.") from None
