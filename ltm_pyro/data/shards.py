"""Rows to WebDataset tar shards and back; the only file that imports webdataset.

Shards are opened here as plain files, and their members decoded as JSON and as `.npy` without pickle. webdataset's own
openers and decoders are never called, because they run commands and unpickle.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ltm_pyro.data.manifest import Manifest, Shard
from ltm_pyro.data.remote import read_file
from ltm_pyro.data.rows import Rows
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write

BLOCK = 64  # rows of one sample: a member costs a kilobyte and 50 µs, too much for a row of 256 bytes
_TOKENS, _META = "tokens.npy", "meta.json"


def write_shard(rows: Rows, path: Path) -> Shard:
    """Writes ``rows`` into a tar file, `BLOCK` rows per sample, whole or not at all.

    The same rows give the same file byte for byte.
    """
    from webdataset.writer import TarWriter  # here, because text can be scored without it

    with atomic_write(path) as new:
        with new.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for block in rows.blocks(BLOCK):
                tar.write(_encode(block))
        with new.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = new.stat().st_size
    return Shard(
        file=path.name,
        sha256=digest,
        size=size,
        sequences=len(rows),
        tokens=int(rows.lengths_N.sum()),
        bytes=int(rows.bytes_N.sum()),
    )


def read_shard(place: str | Path, shard: Shard, cache: Path | None = None) -> Rows:
    """The rows of one shard, every byte and count checked; raises `UsageError` that names the damage.

    Args:
        cache: a folder for a copy of the shard, under its SHA-256.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path, content = f"{place}/{shard.file}", _content(place, shard, cache)
    _check(path, "size in bytes", len(content), shard.size)
    _check(path, "SHA-256", hashlib.sha256(content).hexdigest(), shard.sha256)
    samples = group_by_keys(tar_file_expander([{"url": path, "stream": io.BytesIO(content)}]))
    rows = Rows.join([_decode(sample, path) for sample in samples])
    _check(path, "sequences", len(rows), shard.sequences)
    _check(path, "tokens", int(rows.lengths_N.sum()), shard.tokens)
    return rows


def damage(place: str | Path, manifest: Manifest) -> Iterator[tuple[str, Shard, str | None]]:
    """Split, shard and its damage (None if it is whole), for every shard of a pack."""
    for name, split in manifest.splits.items():
        for shard in split.shards:
            try:
                read_shard(place, shard)
                yield name, shard, None
            except UsageError as error:
                yield name, shard, str(error)


def _content(place: str | Path, shard: Shard, cache: Path | None) -> bytes:
    if Path(shard.file).name != shard.file or ":" in shard.file:
        raise UsageError(f"pack {place} names the shard {shard.file!r}, which is not a file in it; pack again.")
    if cache is None:
        return read_file(place, shard.file)
    cached = cache / shard.sha256
    try:
        if not cached.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_write(cached) as new:  # other processes may fetch the same shard
                new.write_bytes(read_file(place, shard.file))
        return cached.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot keep shards in {cache}: {error.strerror}; choose another data.cache.") from error


def _encode(block: Rows) -> dict[str, Any]:
    """The members of one sample, by extension."""
    npy = io.BytesIO()
    np.lib.format.write_array(npy, block.tokens_NT, allow_pickle=False)
    meta = {
        "first": block.first,
        "lengths": block.lengths_N.tolist(),
        "bytes": block.bytes_N.tolist(),
        "documents": block.documents,
    }
    return {"__key__": f"{block.first:09d}", _TOKENS: npy.getvalue(), _META: json.dumps(meta).encode()}


def _decode(sample: dict[str, Any], path: str) -> Rows:
    try:
        tokens_NT = np.lib.format.read_array(io.BytesIO(sample[_TOKENS]), allow_pickle=False)
        meta = json.loads(sample[_META])
        lengths_N, bytes_N = np.array(meta["lengths"]), np.array(meta["bytes"])
        documents = [[(name, source) for name, source in row] for row in meta["documents"]]
        if not len(tokens_NT) == len(lengths_N) == len(bytes_N) == len(documents):
            raise ValueError("its fields have different lengths")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"shard {path} has a sample that is not rows ({error!r}); pack the text again.") from error
    return Rows(first=meta["first"], tokens_NT=tokens_NT, lengths_N=lengths_N, bytes_N=bytes_N, documents=documents)


def _check(path: str, what: str, found: str | int, expected: str | int) -> None:
    if found != expected:
        raise UsageError(
            f"shard {path} is damaged: its {what} is {found}, the manifest says {expected}; restore it or pack the "
            f"text again."
        )
