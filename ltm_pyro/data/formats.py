"""One reader per format: plain text, JSON lines and Parquet, compressed or not, and data sets of Hugging Face.

Each yields texts with their source labels, and has only a part of a file in memory.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.extras import extra

Text = tuple[str, str | None]  # a text, and its source if the data have one
LONGEST = 2**22  # characters of a `.txt` document
_CHUNK = 2**20
_BREAK = re.compile(r"\r?\n(?:\r?\n){2,}")  # a line's end and two or more empty lines


def read_texts(file: Path) -> Iterator[Text]:
    """The texts of one file, by its extension; raises `UsageError` if it cannot be read in that format."""
    yield from _READERS[_format(file)](file)


def read_records(file: Path) -> Iterator[Any]:
    """The objects of a file of JSON lines, compressed or not, with all their keys; nothing for other formats."""
    if _format(file) == ".jsonl":
        yield from (record for record, _ in _records(file))


def read_hub(name: str) -> Iterator[Text]:
    """The training split of ``NAME[:CONFIG]``, a data set on the Hugging Face hub or in a local folder, streamed."""
    datasets = extra("datasets", "datasets", f"hf:{name}")
    path, _, config = name.partition(":")
    try:
        records = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        for number, record in enumerate(records):
            yield text_of(record, f"hf:{name} record {number}")
    except UsageError:
        raise
    except Exception as error:  # the library raises whatever its own libraries do
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read hf:{name} ({reason}); check its name, or download it and give files.") from error


def text_of(record: Any, where: str) -> Text:
    """The value of ``"text"`` of one record, and that of ``"source"`` if it is a string."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where} has no string under the key "text"; name the text of each document "text".')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} holds half of a surrogate pair, which is not a character; repair it.") from None
    source = record.get("source")
    return text, source if isinstance(source, str) else None


def _format(file: Path) -> str:
    return Path(file.stem if file.suffix in (".gz", ".zst") else file).suffix


def _txt(file: Path) -> Iterator[Text]:
    pending = ""
    for chunk in _decoded(file):
        pending += chunk
        end = len(pending.rstrip("\r\n"))  # the last line ends may be the first half of a break
        *whole, last = _BREAK.split(pending[:end])
        pending = last + pending[end:]
        yield from ((text, None) for text in whole)
        while len(pending) > LONGEST:
            cut = pending.rfind("\n", 0, LONGEST) + 1 or LONGEST
            yield pending[:cut], None
            pending = pending[cut:]
    yield from ((text, None) for text in _BREAK.split(pending))


def _jsonl(file: Path) -> Iterator[Text]:
    yield from (text_of(record, where) for record, where in _records(file))


def _records(file: Path) -> Iterator[tuple[Any, str]]:
    """Each line's object, and its place for messages."""
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where} is not valid JSON ({error}); write one JSON object on each line.") from error
            yield record, where


def _parquet(file: Path) -> Iterator[Text]:
    parquet = extra("pyarrow.parquet", "parquet", str(file))
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in ("text", "source") if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(256, columns=columns):
            for record in batch.to_pylist():
                yield text_of(record, f"{file} row {number}")
                number += 1
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise UsageError(f"cannot read {file} as Parquet ({' '.join(str(error).split())}); write it again.") from error


def _lines(file: Path) -> Iterator[str]:
    pending = ""
    for chunk in _decoded(file):
        *lines, pending = (pending + chunk).split("\n")
        yield from lines
    yield pending


def _decoded(file: Path) -> Iterator[str]:
    """The text of ``file`` in chunks, without a byte order mark at its start."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for raw in _chunks(file):
        if (nul := raw.find(b"\0")) >= 0:
            raise UsageError(f"{file} looks binary (NUL byte at offset {offset + nul}); give text encoded as UTF-8.")
        text = _decode(decoder, raw, file, offset)
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(raw)
    yield _decode(decoder, b"", file, offset, final=True)


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
        with file.open("rb") as raw:
            if file.suffix == ".zst":
                yield from _zstandard(raw, file)
                return
            with gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file} is damaged or cut ({error}); compress it again.") from error
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
