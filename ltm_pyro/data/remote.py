"""Reading a pack from a folder, or from an address that fsspec knows (https, s3, gs and others)."""

from pathlib import Path

from ltm_pyro.errors import UsageError


def is_address(place: str | Path) -> bool:
    """Whether ``place`` is an address and not a path."""
    return "://" in str(place)


def read_file(place: str | Path, name: str) -> bytes:
    """The content of the file ``name`` at ``place``; raises `UsageError` if it cannot be read.

    ``pipe:`` and chained addresses are refused, because fsspec may run commands for them.
    """
    path = f"{str(place).rstrip('/')}/{name}"
    if path.startswith("pipe:") or "::" in path:
        raise UsageError(
            f"{place} is neither a folder nor a plain address; give a path or https://, s3:// or the like."
        )
    try:
        if not is_address(place):
            return Path(place, name).read_bytes()
        import fsspec  # here, because most packs are folders

        with fsspec.open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, ImportError) as error:  # ValueError: fsspec knows no such protocol
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read {path}: {reason}; restore it or check the place.") from error
