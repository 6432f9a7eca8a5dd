"""Documents to rows of at most T tokens, each one document or a piece of one; or cut out of one stream; none is lost.

Shapes: N rows, M tokens of them all, T tokens of one, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer

from ltm_pyro.contracts import DocumentInfo, Part
from ltm_pyro.data.documents import Document
from ltm_pyro.data.encode import Encoded, encode_documents
from ltm_pyro.data.manifest import Layout
from ltm_pyro.data.tokenizer import token_bytes
from ltm_pyro.errors import UsageError

NO_PROMPT = -1


class Row(NamedTuple):
    """The tokens of one row, at most T.

    ``id`` counts the split's rows from 0, ``bytes`` the UTF-8 bytes of the tokens' text. The first ``prompt`` tokens
    are of the document's prompt; None if it has none. ``parts`` are the documents that the row has tokens of, in order:
    one in rows of documents, several in a stream, none in packs of format 2.
    """

    id: int
    tokens_T: UInt[np.ndarray, " T"]
    bytes: int
    prompt: int | None
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N `Row`\\ s with consecutive ids from ``first``; ``tokens_M`` has their tokens one after the other."""

    first: int
    tokens_M: UInt[np.ndarray, " M"]
    lengths_N: Int[np.ndarray, " N"]
    bytes_N: Int[np.ndarray, " N"]
    prompts_N: Int[np.ndarray, " N"]  # `NO_PROMPT` without one
    parts: list[list[Part]]

    def __len__(self) -> int:
        return len(self.lengths_N)

    @cached_property
    def _ends_N(self) -> Int[np.ndarray, " N"]:
        """Where each row ends in ``tokens_M``."""
        return np.cumsum(self.lengths_N)

    def row(self, id: int) -> Row:
        """The row of this id."""
        i = id - self.first
        end, prompt = int(self._ends_N[i]), int(self.prompts_N[i])
        tokens_T = self.tokens_M[end - int(self.lengths_N[i]) : end]
        return Row(id, tokens_T, int(self.bytes_N[i]), None if prompt < 0 else prompt, tuple(self.parts[i]))

    def blocks(self, size: int) -> Iterator["Rows"]:
        """The same rows, ``size`` at a time."""
        starts_N = np.concatenate([[0], self._ends_N])
        for i in range(0, len(self), size):
            last = min(i + size, len(self))
            yield Rows(
                first=self.first + i,
                tokens_M=self.tokens_M[starts_N[i] : starts_N[last]],
                lengths_N=self.lengths_N[i:last],
                bytes_N=self.bytes_N[i:last],
                prompts_N=self.prompts_N[i:last],
                parts=self.parts[i:last],
            )

    @classmethod
    def join(cls, rows: list["Rows"]) -> "Rows":
        """Consecutive rows joined."""
        names = ("tokens_M", "lengths_N", "bytes_N", "prompts_N")
        arrays = {name: np.concatenate([getattr(part, name) for part in rows]) for name in names}
        return cls(first=rows[0].first, parts=[parts for part in rows for parts in part.parts], **arrays)


def pack_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, seq_len: int, layout: Layout = "documents"
) -> Iterator[Rows]:
    """The documents in rows of at most ``seq_len`` tokens, some rows at a time."""
    cutter = Cutter(tokenizer, seq_len, rows=4096, layout=layout)
    for piece in encode_documents(enumerate(documents), tokenizer):
        yield from cutter.add(piece)
    yield from cutter.finish()


def check_seq_len(seq_len: int) -> None:
    """Raises `UsageError` unless a sequence has at least one token, and no more than can be counted."""
    if seq_len >= 2**31:
        raise UsageError(f"seq_len {str(seq_len)[:40]} is more than a row can have; give a few thousand.")
    if seq_len < 1:
        raise UsageError(f"seq_len {seq_len} leaves no token in a sequence; give at least 1.")


class Cutter:
    """Turns encoded pieces into `Rows`, ``rows`` at a time: in bounded memory, and from any position on.

    ``position`` is (document, offset) of the first token that is in no row yet.

    Args:
        layout: ``documents`` begins a row with every document, ``stream`` fills all rows but the last.
        position: that of an earlier cutter, to continue from there; tokens before it are skipped.
        first: the id of the next row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        rows: int,
        position: tuple[int, int] = (0, 0),
        first: int = 0,
        layout: Layout = "documents",
    ) -> None:
        check_seq_len(seq_len)
        self.position, self.first = position, first
        self._rows, self._seq_len, self._layout = rows, seq_len, layout
        self._bytes_V = token_bytes(tokenizer)
        self._tokens: list[UInt[np.ndarray, " n"]] = []  # that are in no row yet
        self._open = _OpenRow()
        self._ready: list[_OpenRow] = []
        self._at = (-1, 0)  # the last piece's document, and how many of its tokens were added

    def add(self, piece: Encoded) -> Iterator[Rows]:
        """Adds one piece; yields rows whenever enough of them are full."""
        number, document, tokens, is_prompt, is_last = piece
        begun = self._at[1] if number == self._at[0] else 0
        self._at = (number, begun + len(tokens))
        if number == self.position[0] and begun < self.position[1]:
            tokens = tokens[self.position[1] - begun :]
            begun = self._at[1] - len(tokens)
        info = DocumentInfo(document.id, document.file, document.source, document.labels, document.exact_nats)
        while len(tokens):
            row = self._open
            taken, tokens = np.split(tokens, [self._seq_len - row.length])
            if not row.parts or row.parts[-1].number != number:
                count = begun // self._seq_len if self._layout == "documents" else None
                row.parts.append(Part(number, count, begun, info))
                row.prompt = NO_PROMPT if document.prompt is None else 0
            row.tokens.append(taken)
            row.prompt += len(taken) * is_prompt
            row.length, begun = row.length + len(taken), begun + len(taken)
            if row.length == self._seq_len:
                self._close((number, begun))
        if is_last and self._layout == "documents" and self._open.length:
            self._close((number, begun))
        while len(self._ready) >= self._rows:
            yield self._cut(self._rows)

    def finish(self) -> Iterator[Rows]:
        """The remaining rows."""
        if self._open.length:
            self._close(self._at)
        while self._ready:
            yield self._cut(min(self._rows, len(self._ready)))

    def _close(self, position: tuple[int, int]) -> None:
        self._open.end = position
        self._ready.append(self._open)
        self._open = _OpenRow()

    def _cut(self, count: int) -> Rows:
        rows, self._ready = self._ready[:count], self._ready[count:]
        tokens_M = np.concatenate([tokens for row in rows for tokens in row.tokens])
        lengths_N = np.array([row.length for row in rows])
        starts_N = np.cumsum(lengths_N) - lengths_N
        cut = Rows(
            first=self.first,
            tokens_M=tokens_M,
            lengths_N=lengths_N,
            bytes_N=np.add.reduceat(self._bytes_V[tokens_M], starts_N),
            prompts_N=np.array([row.prompt if self._layout == "documents" else NO_PROMPT for row in rows]),
            parts=[row.parts for row in rows],
        )
        self.first, self.position = self.first + count, rows[-1].end
        return cut


class _OpenRow:
    """A row that is being filled; ``end`` is the position behind its last token."""

    def __init__(self) -> None:
        self.tokens: list[UInt[np.ndarray, " n"]] = []
        self.parts: list[Part] = []
        self.length, self.prompt, self.end = 0, NO_PROMPT, (0, 0)
