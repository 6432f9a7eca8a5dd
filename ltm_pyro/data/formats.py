"""One reader per format: plain text, JSON lines and Parquet, compressed or not, and data sets of Hugging Face.

Each yields `Record`\\ s, and has only a part of a file in memory. A file's name says its format; if it does not, its
first bytes do.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.extras import extra

LONGEST = 2**22  # characters of a `.txt` document
LONGEST_LINE = 2**29  # characters; more are no text but a mistake, or an archive made to fill memory
LIMIT = "LTM_LONGEST_LINE"  # the environment variable that replaces it
_SHORTER = f"write one document on each line, or in each record, or set {LIMIT} to a larger number."
_CHUNK = 2**20
_AT_ONCE = 2**30  # bytes of a table that are read at once
_HEAD = 2**16  # bytes that tell a format
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_BREAK = re.compile(r"\r?\n(?:\r?\n){2,}")  # a line's end and two or more empty lines


class Record(NamedTuple):
    """One text as its file has it.

    ``line`` is where it begins, counted from 1 with blank lines (its row in a table); the first ``prompt`` characters
    are its prompt, None if it has none; ``fields`` are all other keys of the record.
    """

    text: str
    line: int
    prompt: int | None = None
    fields: dict[str, Any] = {}


def read_records(file: Path) -> Iterator[Record]:
    """The records of one file; raises `UsageError` if it cannot be read in its format."""
    kind = file_format(file)
    if kind is None:
        raise UsageError(f"{file} is neither text nor JSON lines nor Parquet; convert it to .txt or .jsonl.")
    yield from _READERS[kind](file)


def file_format(file: Path) -> str | None:
    """``.txt``, ``.jsonl`` or ``.parquet``: what the name says, else what the content is; None if it is none of them.

    Content that is text, but not JSON lines, is ``.txt``.
    """
    named = Path(file.stem if file.suffix.lower() in (".gz", ".zst") else file).suffix.lower()
    if named in _READERS:
        return named
    with _opened(file) as raw:
        if raw.read(4) == _PARQUET:
            return ".parquet"
    try:
        head = next(_chunks(file), b"")[:_HEAD].removeprefix(codecs.BOM_UTF8)
    except UsageError:
        return None
    first, _, rest = head.lstrip().partition(b"\n")
    if first.startswith(b"{"):
        try:
            return ".jsonl" if isinstance(json.loads(first), dict) else None
        except ValueError:
            return None if rest or len(head) < _HEAD else ".jsonl"  # else one long line, of which this is the start
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    return None if b"\0" in head or first.startswith(b"[") else ".txt"


def read_hub(name: str) -> Iterator[Record]:
    """The training split of ``NAME[:CONFIG]``, a data set on the Hugging Face hub or in a local folder, streamed."""
    datasets = extra("datasets", "datasets", f"hf:{name}")
    path, _, config = name.partition(":")
    try:
        records = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        for number, record in enumerate(records, start=1):
            yield record_of(record, f"hf:{name} record {number}", number)
    except UsageError:
        raise
    except Exception as error:  # the library raises whatever its own libraries do
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read hf:{name} ({reason}); check its name, or download it and give files.") from error


def record_of(record: Any, where: str, line: int) -> Record:
    """The `Record` of an object with ``"text"``, or with ``"prompt"`` and ``"completion"``, the ecosystem's names.

    Raises `UsageError` if it has no such text, or one that is longer than a line may be.
    """
    fields = record if isinstance(record, dict) else {}
    text, prompt, completion = (fields.get(name) for name in ("text", "prompt", "completion"))
    if isinstance(text, str):
        used, length = {"text"}, None
    elif isinstance(prompt, str) and isinstance(completion, str):
        used, text, length = {"prompt", "completion"}, prompt + completion, len(prompt)
    else:
        raise UsageError(
            f'{where} has no string under the key "text"; name the text of each document "text", or its parts "prompt" '
            f'and "completion".'
        )
    if len(text) > (limit := _longest_line()):
        raise UsageError(f"{where} has a text of more than {limit:,} characters; {_SHORTER}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} holds half of a surrogate pair, which is not a character; repair it.") from None
    return Record(text, line, length, {name: value for name, value in fields.items() if name not in used})


def _txt(file: Path) -> Iterator[Record]:
    """A text begins behind two or more empty lines, or where one would be longer than `LONGEST`."""
    pending, line = "", 1
    for chunk in _decoded(file):
        pending += chunk
        end = len(pending.rstrip("\r\n"))  # the last line ends may be the first half of a break
        start = 0
        for found in _BREAK.finditer(pending, 0, end):
            yield Record(pending[start : found.start()], line)
            line += pending.count("\n", start, found.end())
            start = found.end()
        pending = pending[start:]
        while len(pending) > LONGEST:
            cut = pending.rfind("\n", 0, LONGEST) + 1 or LONGEST
            yield Record(pending[:cut], line)
            line += pending.count("\n", 0, cut)
            pending = pending[cut:]
    for text in _BREAK.split(pending.rstrip("\r\n")):  # the end of the last line belongs to the file, as in a break
        yield Record(text, line)


def _jsonl(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where} is not valid JSON ({error}); write one JSON object on each line.") from error
            yield record_of(record, where, number)


def _parquet(file: Path) -> Iterator[Record]:
    parquet = extra("pyarrow.parquet", "parquet", str(file))
    try:
        number, table = 0, parquet.ParquetFile(file)
        groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
        largest = max((x.column(i).total_uncompressed_size for x in groups for i in range(x.num_columns)), default=0)
        # a value is stored once and may be in every row, so that few bytes of a file could fill the memory
        for batch in table.iter_batches(min(max(_AT_ONCE // max(largest, 1), 1), 256)):
            for record in batch.to_pylist():
                number += 1
                yield record_of(record, f"{file} row {number}", number)
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UsageError(f"cannot read {file} as Parquet ({' '.join(str(error).split())}); write it again.") from error


def _lines(file: Path) -> Iterator[str]:
    pending: list[str] = []
    for chunk in _decoded(file):
        first, *rest = chunk.split("\n")
        pending.append(first)
        for line in rest:
            yield "".join(pending)
            pending = [line]
    yield "".join(pending)


def _decoded(file: Path) -> Iterator[str]:
    """The text of ``file`` in chunks, without a byte order mark at its start; `UsageError` at too long a line."""
    decoder, offset, limit, line = codecs.getincrementaldecoder("utf-8")(), 0, _longest_line(), 0
    for raw in _chunks(file):
        if (nul := raw.find(b"\0")) >= 0:
            raise UsageError(f"{file} looks binary (NUL byte at offset {offset + nul}); give text encoded as UTF-8.")
        text = _decode(decoder, raw, file, offset)
        lengths = [*map(len, text.split("\n"))]
        lengths[0] += line
        line = lengths[-1]
        if max(lengths) > limit:
            raise UsageError(f"{file} has a line of more than {limit:,} characters; {_SHORTER}")
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(raw)
    yield _decode(decoder, b"", file, offset, final=True)


def _longest_line() -> int:
    given = os.environ.get(LIMIT, str(LONGEST_LINE))
    if not (given.isascii() and given.isdigit() and 0 < len(given) < 19):
        raise UsageError(
            f"{LIMIT} is {given[:40]!r}, which is no number of characters; give one such as {LONGEST_LINE}."
        )
    return int(given)


def _decode(decoder: codecs.IncrementalDecoder, raw: bytes, file: Path, offset: int, final: bool = False) -> str:
    held = len(decoder.getstate()[0])  # the first bytes of a character that ends in this chunk
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], offset - held + error.start
        raise UsageError(f"{file} is not UTF-8 (byte 0x{byte:02x} at offset {at}); re-encode it.") from error


def _chunks(file: Path) -> Iterator[bytes]:
    """The bytes of ``file``, decompressed; raises `UsageError` if it is cut or damaged."""
    try:
        with _opened(file) as raw:
            magic = raw.read(4)
            raw.seek(0)
            if magic == _ZSTD or file.suffix == ".zst":
                yield from _zstandard(raw, file)
                return
            is_gzip = magic[:2] == _GZIP or file.suffix == ".gz"
            with gzip.GzipFile(fileobj=raw) if is_gzip else raw as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file} is damaged or cut ({error}); compress it again.") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; check the path and its permissions.") from error


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; check the path and its permissions.") from error


def _zstandard(raw: Any, file: Path) -> Iterator[bytes]:
    """Every frame, to its end: the library's own stream stops after one frame, and says nothing where one is cut."""
    zstandard = extra("zstandard", "zstd", str(file))
    frame = None
    try:
        while left := raw.read(_CHUNK // 8):
            while left:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(left)
                left, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise UsageError(f"{file} is damaged or cut ({error}); compress it again.") from error
    if frame:
        raise EOFError("its last frame has no end")


_READERS = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
EXTENSIONS = (*(base + packed for base in (".txt", ".jsonl") for packed in ("", ".gz", ".zst")), ".parquet")
