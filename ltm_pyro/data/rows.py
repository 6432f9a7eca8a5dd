"""Documents to rows: their tokens in one sequence, cut into rows of T tokens; none is lost.

Shapes: N rows, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer

from ltm_pyro.data.documents import Document
from ltm_pyro.data.encode import Encoded, encode_documents
from ltm_pyro.data.tokenizer import end_of_text, token_bytes
from ltm_pyro.errors import UsageError

Named = tuple[str, str]  # a document's id and source


class Row(NamedTuple):
    """T tokens of a split: the first ``length`` are text, the rest `END_OF_TEXT` as padding (in the last row only).

    ``id`` counts the split's rows from 0, ``bytes`` the UTF-8 bytes of the tokens' text; ``documents`` are, in order,
    id and source of the documents that the row has tokens of.
    """

    id: int
    tokens_T: UInt[np.ndarray, " T"]
    length: int
    bytes: int
    documents: tuple[Named, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N `Row`\\ s with consecutive ids from ``first``."""

    first: int
    tokens_NT: UInt[np.ndarray, "N T"]
    lengths_N: Int[np.ndarray, " N"]
    bytes_N: Int[np.ndarray, " N"]
    documents: list[list[Named]]

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def row(self, id: int) -> Row:
        """The row of this id."""
        i = id - self.first
        length, size = int(self.lengths_N[i]), int(self.bytes_N[i])
        return Row(id, self.tokens_NT[i], length, size, tuple(self.documents[i]))

    def blocks(self, size: int) -> Iterator["Rows"]:
        """The same rows, ``size`` at a time."""
        for i in range(0, len(self), size):
            cut = {field.name: getattr(self, field.name)[i : i + size] for field in fields(self)[1:]}
            yield Rows(first=self.first + i, **cut)

    @classmethod
    def join(cls, parts: list["Rows"]) -> "Rows":
        """Consecutive rows joined."""
        arrays = {n: np.concatenate([getattr(p, n) for p in parts]) for n in ("tokens_NT", "lengths_N", "bytes_N")}
        return cls(first=parts[0].first, documents=[x for p in parts for x in p.documents], **arrays)


def pack_rows(documents: Iterable[Document], tokenizer: Tokenizer, seq_len: int) -> Iterator[Rows]:
    """The documents in rows of ``seq_len`` tokens, some rows at a time."""
    cutter = Cutter(tokenizer, seq_len, rows=4096)
    for piece in encode_documents(enumerate(documents), tokenizer):
        yield from cutter.add(piece)
    yield from cutter.finish()


def check_seq_len(seq_len: int) -> None:
    """Raises `UsageError` unless a sequence has at least one token."""
    if seq_len < 1:
        raise UsageError(f"seq_len {seq_len} leaves no token in a sequence; give at least 1.")


class Cutter:
    """Turns encoded pieces into `Rows`, ``rows`` at a time: in bounded memory, and from any position on.

    ``position`` is (document, offset) of the first token that is in no row yet.

    Args:
        position: that of an earlier cutter, to continue from there; tokens before it are skipped.
        first: the id of the next row.
    """

    def __init__(
        self, tokenizer: Tokenizer, seq_len: int, rows: int, position: tuple[int, int] = (0, 0), first: int = 0
    ) -> None:
        check_seq_len(seq_len)
        self.position, self.first = position, first
        self._rows, self._seq_len = rows, seq_len
        self._end, self._bytes_V = end_of_text(tokenizer), token_bytes(tokenizer)
        self._pieces: list[Encoded] = []
        self._size = 0  # tokens in them
        self._at = (-1, 0)  # the last piece's document, and how many of its tokens were added

    def add(self, piece: Encoded) -> Iterator[Rows]:
        """Adds one piece; yields rows whenever enough of them are full."""
        number, _, tokens = piece
        begun = self._at[1] if number == self._at[0] else 0
        self._at = (number, begun + len(tokens))
        if number == self.position[0]:
            piece = piece._replace(tokens=tokens[max(self.position[1] - begun, 0) :])
        if len(piece.tokens):
            self._pieces.append(piece)
            self._size += len(piece.tokens)
        while self._size >= self._rows * self._seq_len:
            yield self._cut(self._rows)

    def finish(self) -> Iterator[Rows]:
        """The remaining rows, the last one padded with `END_OF_TEXT`."""
        if self._size:
            yield self._cut(-(-self._size // self._seq_len))

    def _cut(self, rows: int) -> Rows:
        flat = np.concatenate([piece.tokens for piece in self._pieces])
        flat, rest = np.split(flat, [rows * self._seq_len])
        starts_N = self._seq_len * np.arange(rows)
        lengths_N = np.minimum(len(flat) - starts_N, self._seq_len)
        bytes_N = np.add.reduceat(self._bytes_V[flat], starts_N)
        padding = (0, rows * self._seq_len - len(flat))
        tokens_NT = np.pad(flat, padding, constant_values=self._end).reshape(rows, self._seq_len)
        documents = self._documents(starts_N, starts_N + lengths_N - 1)
        cut = Rows(first=self.first, tokens_NT=tokens_NT, lengths_N=lengths_N, bytes_N=bytes_N, documents=documents)
        self._keep(rest)
        self.first += rows
        return cut

    def _documents(self, first_N: Int[np.ndarray, " N"], last_N: Int[np.ndarray, " N"]) -> list[list[Named]]:
        """The documents of every row, each once, from the positions of its first and last token."""
        ends = np.cumsum([len(piece.tokens) for piece in self._pieces])
        named = [(piece.document.id, piece.document.source) for piece in self._pieces]
        spans = np.searchsorted(ends, np.stack([first_N, last_N]), "right").T.tolist()
        return [list(dict.fromkeys(named[first : last + 1])) for first, last in spans]

    def _keep(self, rest: UInt[np.ndarray, " n"]) -> None:
        """Keeps the remaining tokens; all are of the last piece, because rows are cut as soon as they are full."""
        self._pieces = [self._pieces[-1]._replace(tokens=rest)] if len(rest) else []
        self._size = len(rest)
        self.position = (self._at[0], self._at[1] - len(rest))
