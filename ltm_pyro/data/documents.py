"""Documents from files, folders of them and Hugging Face data sets, read as a stream."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltm_pyro.data.formats import EXTENSIONS, Record, file_format, read_hub, read_records
from ltm_pyro.errors import UsageError

HUB = "hf:"
Label = str | int | float | bool | None  # None: missing


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is ``"file:line"``, the line counted from 1 with blank lines (with the path where two inputs have one name),
    or the value of a field, a string or a whole number; ``source`` is the record's value of ``"source"``, a string
    or a number, else the file's name. The first ``prompt`` characters of ``text`` are its prompt; None if it has none.
    ``exact_nats`` is −log p(text), if the text was generated and that is known.
    """

    id: str | int
    text: str
    source: str
    file: str = ""
    prompt: int | None = None
    labels: dict[str, Label] = {}
    exact_nats: float | None = None


class Fields(NamedTuple):
    """Which fields of a record become a document's id and labels; ``labels`` None takes all that are single values."""

    id: str | None = None
    labels: tuple[str, ...] | None = ()


def read_documents(inputs: Iterable[str | Path], fields: Fields = Fields()) -> Iterator[Document]:  # noqa: B008
    """Every document of ``inputs``, in order; a folder is searched recursively, sorted by name.

    An input is a file, a folder of them, or ``hf:NAME[:CONFIG]``. A `.txt` file is split into documents at runs of two
    or more empty lines, and at the end of a line if one would be longer than 4 million characters. `.jsonl` has one
    object per line, with the text under ``"text"`` or in two parts under ``"prompt"`` and ``"completion"``, and
    optionally a label under ``"source"``; the columns of Parquet and of data sets have the same names. Documents of
    white space only are dropped. Raises `UsageError` for input that cannot be read in its format, for a label that is
    no single value, and for a document without the field that was named as its id.
    """
    origins = [origin for given in inputs for origin in _origins(given)]
    counts, places = Counter(name for _, name, _ in origins), Counter(origin for origin, _, _ in origins)
    if twice := [origin for origin, n in places.items() if n > 1]:
        raise UsageError(f"{twice[0]} is in the input {places[twice[0]]} times: give it once.")
    for origin, name, records in origins:
        name, line, part, found = name if counts[name] == 1 else origin, 0, 0, False
        for record in records:
            if record.text.strip():
                part = part + 1 if record.line == line else 0  # of a line that is cut
                line, found = record.line, True
                yield _document(record, name, f"{line}.{part}" if part else str(line), f"{origin} line {line}", fields)
        if not found:
            raise UsageError(f"{origin} holds no documents; remove it from the input or give it some text.")


def _document(record: Record, name: str, line: str, where: str, fields: Fields) -> Document:
    source = record.fields.get("source")
    source = source.item() if isinstance(source, np.generic) else source
    is_number = isinstance(source, int | float) and not isinstance(source, bool) and math.isfinite(source)
    id: str | int = f"{name}:{line}"
    if fields.id is not None:
        value = record.fields.get(fields.id)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UsageError(f"{where} has no string or whole number under {fields.id!r}, which was named as the id.")
        id = value
    if fields.labels is None:
        labels = {
            key: check_label(x, "")
            for key, x in record.fields.items()
            if x is None or (isinstance(x, str | int | float) and abs(x if isinstance(x, float) else 0) != math.inf)
        }
    else:
        labels = {key: check_label(record.fields.get(key), f"{where} has under {key!r}") for key in fields.labels}
    source = str(source) if isinstance(source, str) or is_number else name
    return Document(id, record.text, source, name, record.prompt, labels, None)


def check_label(value: Any, where: str) -> Label:
    """A value as a label; `UsageError`, which begins with ``where``, if it is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UsageError(f"{where} {str(value)[:60]}, which is no label: a label is a string, a finite number or missing.")


def input_files(given: str | Path) -> list[tuple[Path, str]]:
    """The files of one input, each with its name in document ids; a data set has none.

    In a folder, hidden files are skipped, and files that are neither text by their name nor JSON lines or Parquet by
    their content: `left_out` names those.
    """
    path = Path(given)
    if str(given).startswith(HUB):
        return []
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a .txt, .jsonl or .parquet file or a folder of them.")
    if not path.is_dir():
        if file_format(path) is None:
            raise UsageError(f"{path} is neither text nor JSON lines nor Parquet; convert it to .txt or .jsonl.")
        return [(path, path.name)]
    found = [(file, name) for file, name in _visible(path) if _is_packed(file)]
    if not found:
        raise UsageError(f"folder {path} holds no .txt, .jsonl or .parquet files; give a folder that does.")
    return found


def left_out(given: str | Path) -> list[str]:
    """The visible files of a folder that `input_files` skips."""
    path = Path(given)
    if str(given).startswith(HUB) or not path.is_dir():
        return []
    return [name for file, name in _visible(path) if not _is_packed(file)]


def _is_packed(file: Path) -> bool:
    if not file.is_file():  # a link that leads nowhere
        return False
    return file.name.lower().endswith(EXTENSIONS) or file_format(file) in (".jsonl", ".parquet")


def _visible(folder: Path) -> list[tuple[Path, str]]:
    """The files of a folder that are not hidden, through links to folders as well, sorted by name."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders[:] = []
            continue
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(visible, key=lambda name: (Path(here, name).is_symlink(), name))  # real ones before links
        paths = (Path(here, name) for name in files if not name.startswith("."))
        found += [(path, path.relative_to(folder).as_posix()) for path in paths]
        seen.add(real)
    return sorted(found, key=lambda pair: pair[0])


def _origins(given: str | Path) -> Iterator[tuple[str, str, Iterator[Record]]]:
    """Every file or data set of an input: its place, its name in document ids, and its records."""
    if str(given).startswith(HUB):
        name = str(given).removeprefix(HUB)
        yield str(given), name, read_hub(name)
    yield from ((str(file), name, read_records(file)) for file, name in input_files(given))
