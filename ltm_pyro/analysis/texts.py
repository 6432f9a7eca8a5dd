"""From texts with labels to sequences of tokens; a sequence is one text or a part of it.

Shapes: B sequences, T tokens.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ltm_pyro.data.documents import input_files, read_documents
from ltm_pyro.data.encode import Tokens, encode_document, split_tokens
from ltm_pyro.data.formats import read_records
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run

Longer = Literal["refuse", "cut", "split"]
LONGER: tuple[Longer, ...] = ("refuse", "cut", "split")
_NAME = re.compile(r"(?!(?:document|sequence|\.\.?)\Z)[^/\\\0\ud800-\udfff]+")  # of a variable in netCDF and in zarr
_VALUE = re.compile(r"[^\0\ud800-\udfff]*")


class Text(NamedTuple):
    """A text, the id of its document, and its labels by name."""

    text: str
    document: str
    labels: dict[str, str] = {}


class Piece(NamedTuple):
    """One sequence: the tokens of a text or of a part of it."""

    text: Text
    tokens: Tokens


def read_texts(path: str | Path) -> list[Text]:
    """The documents of a file or folder (`read_documents`); other strings and numbers in JSON lines become labels."""
    documents = [*read_documents([path])]
    labels = {
        f"{name}:{index}": _plain(record)
        for file, name in input_files(path)
        for index, record in enumerate(record for record in read_records(file) if record["text"].strip())
    }
    return [Text(document.text, document.id, labels.get(document.id, {})) for document in documents]


def _plain(record: dict[str, Any]) -> dict[str, str]:
    return {name: str(x) for name, x in record.items() if name != "text" and isinstance(x, str | int | float)}


def as_texts(texts: Sequence[str | Text]) -> list[Text]:
    """Strings become texts without labels; `UsageError` for empty texts and for what netCDF cannot store."""
    if not texts:
        raise UsageError("No text was given: a posterior needs at least one.")
    found = [Text(x, f"text:{index}") if isinstance(x, str) else x for index, x in enumerate(texts)]
    if empty := [text.document for text in found if not text.text.strip()]:
        raise UsageError(f"Text {empty[0]} is empty: leave it out.")
    for text in found:
        _check_storable(text)
    return found


def _check_storable(text: Text) -> None:
    """Raises `UsageError` before any fit, and not hours later when the file is written."""
    for name, value in {"text": text.text, **text.labels}.items():
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"Text {text.document} has the label {name!r}, which no posterior can store: rename it, without / and "
                f"\\, and neither document nor sequence, which are taken."
            )
        if not _VALUE.fullmatch(value):
            raise UsageError(
                f"Text {text.document} has a NUL or half of a surrogate pair under {name!r}, which no posterior can "
                f"store: remove that character."
            )


def pieces(run: Run, texts: Sequence[Text], longer: Longer) -> list[Piece]:
    """The tokens of each text as a document (`encode_document`), in sequences of at most the model's length.

    Args:
        longer: what happens to a longer text: ``refuse`` it, ``cut`` it to its start, or ``split`` it into several
            sequences.
    """
    found = []
    for text in texts:
        tokens = encode_document(run.tokenizer, text.text)
        if longer == "refuse" and len(tokens) > run.length:
            raise UsageError(
                f"Text {text.document} has {len(tokens)} tokens, but the model's length is {run.length}: "
                f"choose to `cut` longer texts to their start, or to `split` them into several sequences."
            )
        rows = split_tokens(tokens, run.length)
        found += [Piece(text, row) for row in (rows[:1] if longer == "cut" else rows)]
    return found
