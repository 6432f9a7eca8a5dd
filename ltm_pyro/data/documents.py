"""Text in: documents from `.txt` and `.jsonl` files and folders of them, read one file or one line at a time."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ltm_pyro.contracts import UsageError

EXTENSIONS = (".jsonl", ".txt")
_BREAK = re.compile(r"\r?\n(?:\r?\n){2,}")  # a line's end and two or more empty lines


class Document(NamedTuple):
    """One text of the corpus; ``id`` is ``"file:index"``, the index counted from 0 within the file."""

    id: str
    text: str


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Every document of the files and folders ``paths``, in order; a folder is searched recursively, sorted by name.

    A `.txt` file is split into documents at runs of two or more empty lines. A `.jsonl` file has one object a line with
    the text under ``"text"``; other keys are ignored. Documents of nothing but white space are dropped. A folder's
    hidden files and files of other kinds are passed over. Raises `UsageError` for input that cannot be read as such.
    """
    for path in map(Path, paths):
        for file, name in _files(path):
            texts = (text for text in _READERS[file.suffix](file) if text.strip())
            index = -1
            for index, text in enumerate(texts):
                yield Document(f"{name}:{index}", text)
            if index < 0:
                raise UsageError(f"{file} holds no documents; remove it from the input or give it some text.")


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """The readable files at ``path``, each with its name in document ids (relative to the folder that was given)."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a .txt or .jsonl file or a folder of them.")
    if not path.is_dir():
        if path.suffix not in EXTENSIONS:
            raise UsageError(f"{path} has the unknown extension {path.suffix!r}; convert it to .txt or .jsonl.")
        yield path, path.name
        return
    found = [file for file in sorted(path.rglob("*")) if file.suffix in EXTENSIONS and file.is_file()]
    visible = [(file, file.relative_to(path)) for file in found]
    visible = [(file, name) for file, name in visible if not any(part.startswith(".") for part in name.parts)]
    if not visible:
        raise UsageError(f"folder {path} holds no .txt or .jsonl files; give a folder that does.")
    yield from ((file, name.as_posix()) for file, name in visible)


def _lines(file: Path) -> Iterator[bytes]:
    """The raw lines of ``file``."""
    try:
        with file.open("rb") as stream:
            yield from stream
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; check the path and its permissions.") from error


def _decode(raw: bytes, file: Path, offset: int = 0) -> str:
    """``raw``, which starts ``offset`` bytes into ``file``, as text; a byte order mark at the start is dropped."""
    nul = raw.find(b"\0")
    if nul >= 0:
        raise UsageError(f"{file} looks binary (NUL byte at offset {offset + nul}); give text encoded as UTF-8.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UsageError(
            f"{file} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {at}); re-encode it."
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_txt(file: Path) -> Iterator[str]:
    yield from _BREAK.split(_decode(b"".join(_lines(file)), file))


def _read_jsonl(file: Path) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(_lines(file), start=1):
        line = _decode(raw, file, offset)
        offset += len(raw)
        if line.strip():
            yield _text_of(line, f"{file} line {number}")


def _text_of(line: str, where: str) -> str:
    """The value under ``"text"`` of one JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON ({error}); write one JSON object on each line.") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where} has no string under the key "text"; name the text of each document "text".')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{where} holds half of a surrogate pair, which is not a character; repair its \\u escapes.")
    return text


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl}
