"""From text to tokens and from tokens to a `Batch`, in one place.

`END_OF_TEXT` is appended to every document and never to a prompt or a context, which may go on. A text therefore has
the same tokens, and the same posterior, wherever it is packed, scored or analysed.
Shapes: B sequences, T tokens.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt
from tokenizers import Tokenizer

from ltm_pyro.contracts import Batch, make_batch
from ltm_pyro.data.documents import Document
from ltm_pyro.data.tokenizer import end_of_text, no_panic, token_dtype
from ltm_pyro.errors import UsageError

Tokens = Sequence[int]  # of one text, or of a part of it
_PIECE = 2**16  # characters; the library needs over 100 bytes of memory for each while it encodes
_BATCH = 2**19  # characters encoded in parallel
_AHEAD = 2  # batches encoded while earlier ones are cut
_CUTS = (re.compile(r"(?<=\S) (?=\S)"), re.compile(r"(?<=[^\W_])(?=[^\w\s'\u2019])"), re.compile(r"(?s)."))


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a whole text, `END_OF_TEXT` last."""
    return [*encode_prompt(tokenizer, text), end_of_text(tokenizer)]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt, a context or a continuation: of text that may go on, so without `END_OF_TEXT`."""
    with no_panic(f"the text {text[:40]!r}"):
        pieces = (tokenizer.encode(piece, add_special_tokens=False) for piece in text_pieces(text))
        try:
            return [token for piece in pieces for token in piece.ids]
        except TypeError:  # which is what the library takes it for
            raise UsageError(f"The text {text[:40]!r} has half of a surrogate pair: leave that out.") from None


class Encoded(NamedTuple):
    """A piece of document ``number`` as tokens; `END_OF_TEXT` follows the document's last piece (``is_last``).

    ``is_prompt`` says whether the piece is of the document's prompt, which is encoded by itself.
    """

    number: int
    document: Document
    tokens: UInt[np.ndarray, " n"]
    is_prompt: bool
    is_last: bool


def encode_documents(documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """`encode_document` for numbered documents, piece by piece in order and in bounded memory.

    The next batches are encoded on all cores while the caller uses earlier ones.
    """
    end, dtype = end_of_text(tokenizer), token_dtype(tokenizer)
    waiting: deque = deque()

    def finish() -> Iterator[Encoded]:
        batch, encoding = waiting.popleft()
        with no_panic(f"the documents from {batch[0].document.id} on"):
            encoded = encoding.result()
        for piece, found in zip(batch, encoded, strict=True):
            tokens = np.array(found.ids + [end] * piece.is_last, dtype)
            yield Encoded(piece.number, piece.document, tokens, piece.is_prompt, piece.is_last)

    with ThreadPoolExecutor(1) as pool:  # the library releases the interpreter's lock, and uses all cores itself
        for batch in _batches(documents):
            texts = [piece.text for piece in batch]
            waiting.append((batch, pool.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)))
            if len(waiting) > _AHEAD:
                yield from finish()
        while waiting:
            yield from finish()


class _Piece(NamedTuple):
    """A piece of document ``number``, and whether it is of the prompt, and the document's last."""

    number: int
    document: Document
    text: str
    is_prompt: bool
    is_last: bool


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for number, document in documents:
        prompt = document.prompt or 0
        parts = [(text, True) for text in text_pieces(document.text[:prompt]) if prompt]
        parts += [(text, False) for text in text_pieces(document.text[prompt:])]
        named = document._replace(text="")  # so that the text is freed once it is encoded
        for index, (text, is_prompt) in enumerate(parts, start=1):
            batch.append(_Piece(number, named, text, is_prompt, index == len(parts)))
            size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def text_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of 65,536 to 131,072 characters, cut at single spaces, where byte-level BPE cuts as well.

    Without such a space in reach a piece ends behind a word, before a full stop or the like, and without that anywhere.
    The tokens at such a place are as good, and the library, whose time for one word grows with its square, ends.
    """
    start = 0
    while len(text) - start > 2 * _PIECE:
        near = (cut.search(text, start + _PIECE, start + 2 * _PIECE) for cut in _CUTS)
        end = next(found.start() for found in near if found)
        yield text[start:end]
        start = end
    yield text[start:]


def split_tokens(tokens: Tokens, length: int) -> list[Tokens]:
    """The tokens of a text in rows of at most ``length``."""
    return [tokens[first : first + length] for first in range(0, len(tokens), length)]


def batches_of_like_length(lengths: Sequence[int], batch_size: int, longest: int) -> list[list[int]]:
    """The indices of rows in batches, the longest rows first: of B rows of the ``longest`` kind, or of as many tokens.

    Padding counts as tokens. A batch has at most 4 B rows, however short they are, because each has thoughts of its
    own. The order of rows that are equally long stays.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    while order:
        size = min(max(batch_size, batch_size * longest // max(1, lengths[order[0]])), 4 * batch_size)
        batches.append(order[:size])
        order = order[size:]
    return batches


def batch_of_rows(rows: Sequence[Tokens], start_token: int, length: int, device: torch.device | str = "cpu") -> Batch:
    """A `Batch` of B rows of tokens, padded on the right to the longest row, and to one token at least.

    Args:
        length: of the model; `UsageError` if a row is longer.
    """
    lengths_B = torch.tensor([len(row) for row in rows])
    if (longest := max(1, int(lengths_B.max()))) > length:
        raise UsageError(f"A text has {longest} tokens, but the model's length is {length}: shorten it.")
    padded = [[*row, *[start_token] * (longest - len(row))] for row in rows]
    return make_batch(torch.tensor(padded), lengths_B, start_token).to(device)
