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
from jaxtyping import Int

from ltm_pyro.contracts import DocumentInfo, Part
from ltm_pyro.data.manifest import Manifest, Shard, Split
from ltm_pyro.data.remote import read_file
from ltm_pyro.data.rows import NO_PROMPT, Rows
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


def read_shard(place: str | Path, manifest: Manifest, shard: Shard, first: int, cache: Path | None = None) -> Rows:
    """The rows of one shard, every byte and count checked; raises `UsageError` that names the damage.

    Args:
        first: the id of its first row.
        cache: a folder for a copy of the shard, under its SHA-256.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path, content = f"{place}/{shard.file}", _content(place, shard, cache)
    what = f"shard {path}"
    _check(what, "size in bytes", len(content), shard.size)
    _check(what, "SHA-256", hashlib.sha256(content).hexdigest(), shard.sha256)
    samples = group_by_keys(tar_file_expander([{"url": path, "stream": io.BytesIO(content)}]))
    rows = Rows.join([_decode(sample, path) for sample in samples])
    _check(what, "first row", rows.first, first)
    _check(what, "sequences", len(rows), shard.sequences)
    _check(what, "tokens", int(rows.lengths_N.sum()), shard.tokens)
    if rows.lengths_N.max() > manifest.seq_len or rows.tokens_M.max() >= manifest.vocabulary:
        raise UsageError(
            f"shard {path} has a row of more than {manifest.seq_len} tokens, or a token beyond the vocabulary of "
            f"{manifest.vocabulary}, which its manifest rules out; pack the text again."
        )
    return rows


def damage(place: str | Path, manifest: Manifest) -> Iterator[tuple[str, str, str | None]]:
    """Split, file and its damage (None if it is whole), for every file of rows or lengths of a pack."""
    for name, split in manifest.splits.items():
        first, found = 0, []
        for shard in split.shards:
            problem = None
            try:
                found.append(read_shard(place, manifest, shard, first).lengths_N)
            except UsageError as error:
                problem = str(error)
            yield name, shard.file, problem
            first += shard.sequences
        if split.lengths:
            problem = None
            try:
                lengths_N = read_lengths(place, name, split, manifest.seq_len)
                if len(found) == len(split.shards) and not np.array_equal(lengths_N, np.concatenate(found)):
                    problem = f"{place}/{lengths_file(name)} has other lengths than the shards; pack the text again."
            except UsageError as error:
                problem = str(error)
            yield name, lengths_file(name), problem


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


def write_lengths(lengths_N: Int[np.ndarray, " N"], path: Path) -> str:
    """Writes the tokens of every row of a split, and returns the file's SHA-256."""
    npy = io.BytesIO()
    np.lib.format.write_array(npy, lengths_N.astype(np.uint32), allow_pickle=False)
    with atomic_write(path) as new:
        new.write_bytes(npy.getvalue())
    return hashlib.sha256(npy.getvalue()).hexdigest()


def read_lengths(place: str | Path, name: str, split: Split, seq_len: int) -> Int[np.ndarray, " N"]:
    """The tokens of every row of a split of documents, checked against the manifest."""
    path, content = f"{place}/{lengths_file(name)}", read_file(place, lengths_file(name))
    _check(path, "SHA-256", hashlib.sha256(content).hexdigest(), str(split.lengths))
    lengths_N = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False).astype(np.int64)
    _check(path, "sequences", lengths_N.size, split.sequences)
    _check(path, "tokens", int(lengths_N.sum()), split.tokens)
    if lengths_N.min() < 1 or lengths_N.max() > seq_len:
        raise UsageError(f"{path} has a row that is empty or longer than {seq_len} tokens; pack the text again.")
    return lengths_N


def lengths_file(split: str) -> str:
    """The name of the file that has the tokens of every row."""
    return f"{split}-lengths.npy"


def _encode(block: Rows) -> dict[str, Any]:
    """The members of one sample, by extension; a document is described once, rows have its number."""
    npy = io.BytesIO()
    np.lib.format.write_array(npy, block.tokens_M, allow_pickle=False)
    documents = {part.number: part.document for parts in block.parts for part in parts}
    meta = {
        "first": block.first,
        "lengths": block.lengths_N.tolist(),
        "bytes": block.bytes_N.tolist(),
        "prompts": block.prompts_N.tolist(),
        "parts": [[(part.number, part.piece, part.offset) for part in parts] for parts in block.parts],
        "documents": documents,
    }
    return {"__key__": f"{block.first:09d}", _TOKENS: npy.getvalue(), _META: json.dumps(meta).encode()}


def _decode(sample: dict[str, Any], path: str) -> Rows:
    try:
        tokens = np.lib.format.read_array(io.BytesIO(sample[_TOKENS]), allow_pickle=False)
        meta = json.loads(sample[_META])
        lengths_N, bytes_N = np.array(meta["lengths"], np.int64), np.array(meta["bytes"], np.int64)
        if tokens.dtype.kind != "u" or (lengths_N < 1).any():
            raise ValueError("its tokens are no whole numbers, or a row has none")
        if tokens.ndim == 2:  # format 2: padded rows, whose documents are not kept
            tokens_M = tokens[np.arange(tokens.shape[1]) < lengths_N[:, None]]
            prompts_N = np.full(len(tokens), NO_PROMPT)
            parts: list[list[Part]] = [[] for _ in tokens]
        else:
            tokens_M, prompts_N = tokens, np.array(meta["prompts"], np.int64)
            known = {int(number): DocumentInfo(*x) for number, x in meta["documents"].items()}
            parts = [[Part(n, piece, offset, known[n]) for n, piece, offset in row] for row in meta["parts"]]
        if not len(lengths_N) == len(bytes_N) == len(prompts_N) == len(parts) or len(tokens_M) != lengths_N.sum():
            raise ValueError("its fields have different lengths")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UsageError(f"shard {path} has a sample that is not rows ({error!r}); pack the text again.") from error
    return Rows(
        first=meta["first"], tokens_M=tokens_M, lengths_N=lengths_N, bytes_N=bytes_N, prompts_N=prompts_N, parts=parts
    )


def _check(file: str, what: str, found: str | int, expected: str | int) -> None:
    if found != expected:
        raise UsageError(
            f"{file} is damaged: its {what} is {found}, the manifest says {expected}; restore it or pack the "
            f"text again."
        )
