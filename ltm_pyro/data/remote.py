"""Reading a pack from a folder, or from an address that fsspec knows (https, s3, gs and others)."""

import errno
import os
from pathlib import Path

from ltm_pyro.errors import UsageError


def is_address(place: str | Path) -> bool:
    """Whether ``place`` is an address and not a path."""
    return "://" in str(place)


def read_file(place: str | Path, name: str, most: int) -> bytes:
    """The content of the file ``name`` at ``place``; raises `UsageError` if it cannot be read.

    ``pipe:`` and chained addresses are refused, because fsspec may run commands for them; so is what is no file, such
    as a named pipe, and more than ``most`` bytes, before they are in memory.
    """
    path = f"{str(place).rstrip('/')}/{name}"
    if path.startswith("pipe:") or "::" in path:
        raise UsageError(
            f"{place} is neither a folder nor a plain address; give a path or https://, s3:// or the like."
        )
    try:
        if not is_address(place):
            return read_at_most(Path(place, name), most)
        import fsspec  # here, because most packs are folders

        with fsspec.open(path, "rb") as stream:
            content = stream.read(most + 1)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:  # ValueError: fsspec knows no such protocol
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read {path}: {reason}; restore it or check the place.") from error
    if len(content) > most:
        raise UsageError(f"{path} is larger than the {most:,} bytes that it may have; pack the text again.")
    return content


def read_at_most(file: Path, most: int) -> bytes:
    """The content of a local file; raises `UsageError` if it is no file, or has more than ``most`` bytes."""
    if not file.is_file():
        if file.exists():
            raise UsageError(f"{file} is no file; restore it or pack the text again.")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    with file.open("rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise UsageError(
                f"{file} has {size:,} bytes, more than the {most:,} that it may have; pack the text again."
            )
        return stream.read(size)  # which makes room for as many bytes as it is asked for
