"""From texts with labels to sequences of tokens; a sequence is one text or a part of it.

Shapes: B sequences, T tokens.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ltm_pyro.data.documents import Fields, Label, read_documents
from ltm_pyro.data.encode import Tokens, encode_document, split_tokens
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run

Longer = Literal["refuse", "cut", "split"]
LONGER: tuple[Longer, ...] = ("refuse", "cut", "split")
_NAME = re.compile(r"(?!(?:document|sequence|\.\.?)\Z)[^/\\\0\ud800-\udfff]+")  # of a variable in netCDF and in zarr
_VALUE = re.compile(r"[^\0\ud800-\udfff]*")


class Text(NamedTuple):
    """A text, the id of its document, and its labels by name; None where one is missing."""

    text: str
    document: str
    labels: Mapping[str, Label] = {}


class Piece(NamedTuple):
    """One sequence: the tokens of a text or of a part of it."""

    text: Text
    tokens: Tokens


def read_texts(path: str | Path, id: str | None = None) -> list[Text]:
    """The documents of a file or folder (`read_documents`); other strings and numbers of a record become labels.

    Args:
        id: the field that names a document, instead of file and line; texts of one name are one document.
    """
    found = read_documents([path], Fields(id=id, labels=None))
    return [Text(x.text, str(x.id), {name: y for name, y in x.labels.items() if name != id}) for x in found]


def label_values(labels: Sequence[Mapping[str, Label]], name: str) -> np.ndarray:
    """One label of all texts: numbers if all are, NaN where missing; else strings, empty where missing.

    Where numbers and strings occur together, each is written as JSON, so that 1 and "1" stay different.
    """
    values = [found.get(name) for found in labels]
    present = [x for x in values if x is not None]
    numbers = [x for x in present if isinstance(x, int | float) and not isinstance(x, bool)]
    exact = all(isinstance(x, float) or abs(x) < 2**53 for x in numbers)  # larger ones are not all different as floats
    if present and exact and len(numbers) == len(present):
        whole = len(present) == len(values) and all(isinstance(x, int) for x in present)
        return np.array([math.nan if x is None else x for x in values], int if whole else float)
    plain = all(isinstance(x, str) for x in present)
    return np.array(["" if x is None else x if plain else json.dumps(x) for x in values], dtype=object)


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
        if isinstance(value, str) and not _VALUE.fullmatch(value):
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
