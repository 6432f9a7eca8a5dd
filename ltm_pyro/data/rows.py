"""Documents to rows: every document followed by `END_OF_TEXT`, all of them cut into rows of T tokens, nothing lost.

Shapes: N rows, T tokens, V vocabulary.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer

from ltm_pyro.data.documents import Document
from ltm_pyro.data.tokenizer import end_of_text, token_bytes, token_dtype
from ltm_pyro.errors import UsageError

_PIECE = 2**16  # characters; the library needs over 100 bytes of memory for each while it encodes
_BATCH = 2**19  # characters encoded in parallel
_AHEAD = 2  # batches encoded while earlier ones are cut
_SPACE = re.compile(r"(?<=\S) (?=\S)")


Named = tuple[str, str]  # a document's id and source


class Row(NamedTuple):
    """T tokens of a split: the first ``length`` are text, the rest `END_OF_TEXT` as padding (in the last row only).

    ``id`` counts the split's rows from 0, ``bytes`` the UTF-8 bytes behind the tokens; ``documents`` are, in order,
    id and source of those that the row has tokens of.
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
        """Rows that follow one another, as one."""
        arrays = {n: np.concatenate([getattr(p, n) for p in parts]) for n in ("tokens_NT", "lengths_N", "bytes_N")}
        return cls(first=parts[0].first, documents=[x for p in parts for x in p.documents], **arrays)


class Encoded(NamedTuple):
    """A piece of document ``number`` as tokens; the document's last piece has `END_OF_TEXT` behind."""

    number: int
    document: Document
    tokens: UInt[np.ndarray, " n"]


def encode(documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The numbered documents' pieces, in order; batches are encoded on every core while earlier ones are used."""
    end, dtype = end_of_text(tokenizer), token_dtype(tokenizer)
    waiting: deque = deque()

    def finish() -> Iterator[Encoded]:
        batch, encoding = waiting.popleft()
        for (number, document, _, last), found in zip(batch, encoding.result(), strict=True):
            yield Encoded(number, document, np.array(found.ids + [end] * last, dtype))

    with ThreadPoolExecutor(1) as pool:  # the library lets go of the interpreter, and uses every core by itself
        for batch in _batches(documents):
            texts = [text for _, _, text, _ in batch]
            waiting.append((batch, pool.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)))
            if len(waiting) > _AHEAD:
                yield from finish()
        while waiting:
            yield from finish()


class _Text(NamedTuple):
    """A piece of document ``number`` before it is encoded."""

    number: int
    document: Document
    text: str
    last: bool


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
    size = 0
    for number, document in documents:
        *init, last = text_pieces(document.text)
        named = document._replace(text="")  # which is not held longer than it takes to encode it
        for text in (*init, last):
            batch.append(_Text(number, named, text, text is last))
            size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def pack_rows(documents: Iterable[Document], tokenizer: Tokenizer, seq_len: int) -> Iterator[Rows]:
    """The documents' rows of ``seq_len`` tokens, some at a time."""
    cutter = Cutter(tokenizer, seq_len, rows=4096)
    for piece in encode(enumerate(documents), tokenizer):
        yield from cutter.add(piece)
    yield from cutter.finish()


def check_seq_len(seq_len: int) -> None:
    """Raises `UsageError` unless a sequence has at least one token."""
    if seq_len < 1:
        raise UsageError(f"seq_len {seq_len} leaves no token in a sequence; give at least 1.")


def text_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of some 65,000 characters, cut at single spaces, where byte-level BPE cuts anyway."""
    start = 0
    while space := _SPACE.search(text, start + _PIECE):
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


class Cutter:
    """Pieces in, `Rows` out, ``rows`` of them at a time: in bounded memory, and from any point on.

    ``position`` is (document, offset): where the tokens begin that no row has yet.

    Args:
        position: where an earlier cutter came to; tokens before it are left out.
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
        self._at = (-1, 0)  # the last piece's document, and how many of its tokens have come

    def add(self, piece: Encoded) -> Iterator[Rows]:
        """Takes one piece; yields rows as often as enough are full."""
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
        """What is left, its last row padded with `END_OF_TEXT`."""
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
        """Every row's documents, each once, from its first and last token."""
        ends = np.cumsum([len(piece.tokens) for piece in self._pieces])
        named = [(piece.document.id, piece.document.source) for piece in self._pieces]
        spans = np.searchsorted(ends, np.stack([first_N, last_N]), "right").T.tolist()
        return [list(dict.fromkeys(named[first : last + 1])) for first, last in spans]

    def _keep(self, rest: UInt[np.ndarray, " n"]) -> None:
        """Goes on with the tokens that are left; all are of the last piece, since rows are cut as soon as full."""
        self._pieces = [self._pieces[-1]._replace(tokens=rest)] if len(rest) else []
        self._size = len(rest)
        self.position = (self._at[0], self._at[1] - len(rest))
