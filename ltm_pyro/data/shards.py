"""Rows to WebDataset tar shards and back; the one door to webdataset.

Shards are opened here as plain files and their members decoded here as JSON and pickle-free `.npy`: webdataset's own
openers and decoders, which run commands and unpickle, are never called.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from ltm_pyro.contracts import UsageError
from ltm_pyro.data.manifest import Shard, read_manifest
from ltm_pyro.data.rows import Row

_TOKENS, _META = "tokens.npy", "meta.json"


def write_shards(rows: Iterable[Row], directory: Path, split: str, shard_rows: int) -> Iterator[Shard]:
    """Writes ``rows`` into tar files of ``shard_rows`` rows, ``{split}-000000.tar`` onwards, each described when done.

    The same rows give the same files byte for byte.
    """
    rows = iter(rows)
    for number, first in enumerate(rows):
        yield _write_shard(chain([first], islice(rows, shard_rows - 1)), directory / f"{split}-{number:06d}.tar")


def read_rows(directory: str | Path, split: str) -> Iterator[Row]:
    """Every row of one split of the pack ``directory``, in order; raises `UsageError` where it is damaged."""
    if str(directory).startswith("pipe:") or "://" in str(directory):
        raise UsageError(f"{directory} is not a folder; copy the pack to this machine and give its path.")
    splits = read_manifest(directory).splits
    if split not in splits:
        raise UsageError(f"pack {directory} has no split {split!r} but {sorted(splits)}; pack the text again with one.")
    return chain.from_iterable(read_shard(directory, shard) for shard in splits[split].shards)


def read_shard(directory: str | Path, shard: Shard) -> Iterator[Row]:
    """The rows of one shard; its SHA-256 is checked before the first and its counts after the last (`UsageError`)."""
    if Path(shard.file).name != shard.file or ":" in shard.file:
        raise UsageError(f"pack {directory} names the shard {shard.file!r}, which is not a file in it; pack again.")
    path = Path(directory) / shard.file
    sequences = tokens = 0
    with _open(path) as stream:
        _check(path, "SHA-256", hashlib.file_digest(stream, "sha256").hexdigest(), shard.sha256)
        stream.seek(0)
        for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
            row = _decode(sample, path)
            sequences, tokens = sequences + 1, tokens + row.length
            yield row
    _check(path, "sequences", sequences, shard.sequences)
    _check(path, "tokens", tokens, shard.tokens)


def _write_shard(rows: Iterable[Row], path: Path) -> Shard:
    sequences = tokens = size = 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for row in rows:
            tar.write(_encode(row))
            sequences, tokens, size = sequences + 1, tokens + row.length, size + row.bytes
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Shard(file=path.name, sha256=digest, sequences=sequences, tokens=tokens, bytes=size)


def _encode(row: Row) -> dict[str, Any]:
    """The members of one sample, by extension."""
    npy = io.BytesIO()
    np.lib.format.write_array(npy, row.tokens_T, allow_pickle=False)
    meta = {"id": row.id, "length": row.length, "bytes": row.bytes, "documents": row.documents}
    return {"__key__": f"{row.id:09d}", _TOKENS: npy.getvalue(), _META: json.dumps(meta).encode()}


def _decode(sample: dict[str, Any], path: Path) -> Row:
    try:
        tokens_T = np.lib.format.read_array(io.BytesIO(sample[_TOKENS]), allow_pickle=False)
        meta = json.loads(sample[_META])
        return Row(meta["id"], tokens_T, meta["length"], meta["bytes"], tuple(meta["documents"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"shard {path} has a sample that is not a row ({error!r}); pack the text again.") from error


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read shard {path}: {error.strerror}; restore it or pack the text again.") from error


def _check(path: Path, what: str, found: str | int, expected: str | int) -> None:
    if found != expected:
        raise UsageError(
            f"shard {path} is damaged: its {what} is {found}, the manifest says {expected}; pack the text again."
        )
