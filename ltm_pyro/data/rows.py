"""Documents to rows: every document followed by `END_OF_TEXT`, all of them cut into rows of T tokens, nothing lost."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt
from tokenizers import Tokenizer

from ltm_pyro.contracts import UsageError
from ltm_pyro.data.documents import Document
from ltm_pyro.data.tokenizer import end_of_text, token_bytes, token_dtype

_PIECE = 2**16  # characters; the library needs over 100 bytes of memory for each while it encodes
_BATCH = 2**20  # characters encoded in parallel
_SPACE = re.compile(r"(?<=\S) (?=\S)")


class Row(NamedTuple):
    """T tokens of a split: the first ``length`` are text, the rest `END_OF_TEXT` as padding (in the last row only).

    ``id`` counts the split's rows from 0, ``bytes`` the UTF-8 bytes behind the tokens, and ``documents`` names, in
    order, the documents that the row has tokens of.
    """

    id: int
    tokens_T: UInt[np.ndarray, " T"]
    length: int
    bytes: int
    documents: tuple[str, ...]


class _Piece(NamedTuple):
    document: str
    text: str
    last: bool


def pack_rows(documents: Iterable[Document], tokenizer: Tokenizer, seq_len: int) -> Iterator[Row]:
    """The documents' rows of ``seq_len`` tokens, in bounded memory."""
    check_seq_len(seq_len)
    return _cut(_encode(documents, tokenizer), seq_len, end_of_text(tokenizer), token_bytes(tokenizer))


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


def _encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Pieces of the documents, in order, as (document id, tokens); a document's last piece has `END_OF_TEXT` behind."""
    end, dtype = end_of_text(tokenizer), token_dtype(tokenizer)
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            yield piece.document, np.array(encoding.ids + [end] * piece.last, dtype)


def _batches(documents: Iterable[Document]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(documents):
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(documents: Iterable[Document]) -> Iterator[_Piece]:
    for document in documents:
        *init, last = text_pieces(document.text)
        yield from (_Piece(document.id, text, last=False) for text in init)
        yield _Piece(document.id, last, last=True)


def _cut(
    pieces: Iterable[tuple[str, np.ndarray]], seq_len: int, end: int, bytes_V: Int[np.ndarray, " V"]
) -> Iterator[Row]:
    """Rows of exactly ``seq_len`` tokens; what remains at the end is padded with ``end``."""
    number, pending = 0, np.empty(0, np.uint16)
    names: list[str] = []
    for name, tokens in pieces:
        pending = np.concatenate([pending, tokens]) if len(pending) else tokens
        names += [name] * (names[-1:] != [name])
        while len(pending) >= seq_len:
            head, pending = pending[:seq_len], pending[seq_len:]
            yield Row(number, head, seq_len, int(bytes_V[head].sum()), tuple(names))
            number, names = number + 1, [name] * bool(len(pending))
    if length := len(pending):
        padded = np.pad(pending, (0, seq_len - length), constant_values=end)
        yield Row(number, padded, length, int(bytes_V[pending].sum()), tuple(names))
