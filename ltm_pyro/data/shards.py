"""Rows to WebDataset tar shards and back; the only file that imports webdataset.

Shards are opened here as plain files, and their members decoded as JSON and as `.npy` without pickle. webdataset's own
openers and decoders are never called, because they run commands, decompress without a limit and unpickle. Every reader
of a pack comes through `read_shard` and `read_lengths`: what they return is checked down to the last number, and takes
no more memory than a few times the size that the manifest allows.
"""

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ltm_pyro.contracts import DocumentInfo, Part
from ltm_pyro.data.documents import check_label
from ltm_pyro.data.manifest import LARGEST_SHARD, OLD, Manifest, Shard, Split
from ltm_pyro.data.remote import read_at_most, read_file
from ltm_pyro.data.rows import NO_PROMPT, Rows
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write

BLOCK = 64  # rows of one sample: a member costs a kilobyte and 50 µs, too much for a row of 256 bytes
_MOST_META = 2**26  # bytes that describe a sample's rows; as Python's objects they take thirty times as many
_NPY_HEADER = 2**14  # bytes, at most
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
        if (size := new.stat().st_size) > LARGEST_SHARD:
            raise UsageError(f"A shard of {len(rows)} rows has {size:,} bytes, too many to be read: lower --seq-len.")
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
    path, content = f"{place}/{shard.file}", _content(place, shard, cache)
    what = f"shard {path}"
    _check(what, "size in bytes", len(content), shard.size)
    _check(what, "SHA-256", hashlib.sha256(content).hexdigest(), shard.sha256)
    parts: list[Rows] = []
    try:
        for sample in _samples(content):
            parts.append(_decode(sample, manifest, first))
            first += len(parts[-1])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, tarfile.TarError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(f"shard {path} has a sample that is not rows ({reason}); pack the text again.") from error
    _check(what, "sequences", sum(map(len, parts)), shard.sequences)
    rows = Rows.join(parts)
    _check(what, "tokens", int(rows.lengths_N.sum()), shard.tokens)
    _check(what, "bytes of text", int(rows.bytes_N.sum()), shard.bytes)
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
        return read_file(place, shard.file, shard.size)
    cached = cache / shard.sha256
    try:
        if not cached.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_write(cached) as new:  # other processes may fetch the same shard
                new.write_bytes(read_file(place, shard.file, shard.size))
        return read_at_most(cached, shard.size)
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
    path, most = f"{place}/{lengths_file(name)}", 4 * split.sequences + _NPY_HEADER
    content = read_file(place, lengths_file(name), most)
    _check(path, "SHA-256", hashlib.sha256(content).hexdigest(), str(split.lengths))
    try:
        lengths_N = _array(content).astype(np.int64).ravel()
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{path} is no list of lengths ({str(error)[:200]}); pack the text again.") from None
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
    described = json.dumps(meta).encode()
    if len(described) > _MOST_META:
        raise UsageError(
            f"The ids and labels of {len(block)} rows take {len(described):,} bytes, too many to be read: keep fewer."
        )
    return {"__key__": f"{block.first:09d}", _TOKENS: npy.getvalue(), _META: described}


def _samples(content: bytes) -> Iterator[dict[str, bytes]]:
    """The members of each sample of a tar file, by extension; neither compressed nor sparse files, nor links."""
    key, sample = "", dict[str, bytes]()
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            before, (key, _, name) = key, member.name.partition(".")
            if not member.isreg() or member.issparse() or not 0 <= member.size <= len(content):
                raise ValueError(f"{member.name[:40]} is no plain file of at most {len(content)} bytes")
            if sample and key != before:
                yield sample
                sample = {}
            file = tar.extractfile(member)
            sample[name] = b"" if file is None else file.read()
    if sample:
        yield sample


def _array(content: bytes) -> UInt[np.ndarray, "..."]:
    """Whole numbers from 0 in `.npy`; `ValueError` unless they are all there: numpy would make room for any header."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of .npy is not read")
    try:
        shape, by_column, dtype = readers[version](stream)
    except Exception as error:  # whatever Python's own parser raises
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from None
    if dtype.kind != "u" or dtype.itemsize > 4 or by_column:
        raise ValueError(f"its numbers are {dtype}, and tokens and lengths are uint16 or uint32")
    count, left = math.prod(shape), len(content) - stream.tell()
    if min(shape, default=0) < 0 or count * dtype.itemsize != left:
        raise ValueError(f"its header tells of {count} numbers, and {left} bytes follow")
    return np.frombuffer(content, dtype, count, stream.tell()).reshape(shape).astype(dtype.newbyteorder("="))


def _decode(sample: dict[str, bytes], manifest: Manifest, first: int) -> Rows:
    """The rows of one sample; raises `ValueError`, `TypeError` or `KeyError` unless every number can be right.

    Args:
        first: the id of its first row.
    """
    if len(sample[_META]) > _MOST_META:
        raise ValueError(f"its {_META} has {len(sample[_META]):,} bytes, more than {_MOST_META:,}")
    tokens, meta = _array(sample[_TOKENS]), json.loads(sample[_META])
    lengths_N = _whole_numbers(meta["lengths"], "lengths", 1, manifest.seq_len)
    bytes_N = _whole_numbers(meta["bytes"], "bytes", 0, 2**40)
    if _whole_numbers([meta["first"]], "first", 0, 2**62)[0] != first:
        raise ValueError(f"its first row is {meta['first']}, and the rows before it end at {first}")
    if manifest.format == OLD:  # padded rows, whose documents are not kept
        tokens_M = tokens[np.arange(tokens.shape[1]) < lengths_N[:, None]]
        prompts_N = np.full(len(tokens), NO_PROMPT)
        parts: list[list[Part]] = [[] for _ in tokens]
    else:
        tokens_M = tokens.ravel()
        prompts_N = _whole_numbers(meta["prompts"], "prompts", NO_PROMPT, manifest.seq_len)
        known = {int(number): _document(x) for number, x in meta["documents"].items()}
        parts = [[_part(x, known) for x in row] for row in meta["parts"]]
        if not all(len(row) == 1 if manifest.rows == "documents" else row for row in parts):
            raise ValueError("a row has no document, or several")
    if not 0 < len(lengths_N) == len(bytes_N) == len(prompts_N) == len(parts) or len(tokens_M) != lengths_N.sum():
        raise ValueError("its fields have different lengths, or none")
    if (prompts_N > lengths_N).any():
        raise ValueError("a prompt is longer than its row")
    if (largest := tokens_M.max()) >= manifest.vocabulary:
        raise ValueError(f"the token {largest} is beyond the vocabulary of {manifest.vocabulary}")
    return Rows(first=first, tokens_M=tokens_M, lengths_N=lengths_N, bytes_N=bytes_N, prompts_N=prompts_N, parts=parts)


def _whole_numbers(values: Any, name: str, low: int, high: int) -> Int[np.ndarray, " N"]:
    """A list as an array; numpy would cut off what is behind a point, and take texts for numbers."""
    wrong = [x for x in values if type(x) is not int or not low <= x <= high]
    if wrong:
        raise ValueError(f"{name} has {str(wrong[0])[:40]}, which is no whole number from {low} to {high}")
    return np.array(values, np.int64)


def _document(x: Any) -> DocumentInfo:
    info = DocumentInfo(*x)
    exact = info.exact_nats
    if type(info.id) not in (str, int) or not all(isinstance(text, str) for text in info[1:3]):
        raise ValueError("a document has no text or whole number as its id, or no text as its file or source")
    if not isinstance(info.labels, dict):
        raise ValueError("a document has no labels by name")
    for name, value in info.labels.items():
        check_label(value, f"{name!r} is")
    if exact is not None and not (isinstance(exact, int | float) and math.isfinite(exact)):
        raise ValueError(f"exact_nats is {str(exact)[:40]}")
    return info


def _part(x: Any, known: dict[int, DocumentInfo]) -> Part:
    number, piece, offset = x
    if any(type(n) is not int or n < 0 for n in (number, offset, 0 if piece is None else piece)):
        raise ValueError(f"{str(x)[:60]} is no part of a document")
    return Part(number, piece, offset, known[number])


def _check(file: str, what: str, found: str | int, expected: str | int) -> None:
    if found != expected:
        raise UsageError(
            f"{file} is damaged: its {what} is {found}, the manifest says {expected}; restore it or pack the "
            f"text again."
        )
