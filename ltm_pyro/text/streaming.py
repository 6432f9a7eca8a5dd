"""Text from tokens while they are generated, always in whole characters."""

import sys
from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Protocol, TextIO, runtime_checkable

from tokenizers import Tokenizer
from torch import Tensor

from ltm_pyro.data.tokenizer import byte_alphabet, vocabulary_size


@runtime_checkable
class Streamer(Protocol):
    """Hugging Face's protocol: `put` is called with the prompt's tokens, shape (1, T), then with each new one, (1,)."""

    def put(self, value: Tensor) -> None:
        """Receives tokens."""
        ...

    def end(self) -> None:
        """Is called when the text is complete."""
        ...


class TextDecoder:
    """The text of one row, token by token; bytes that are no valid UTF-8 are left out."""

    def __init__(self, bytes_V: list[bytes]) -> None:
        self._bytes_V, self._utf8 = bytes_V, getincrementaldecoder("utf-8")("ignore")

    def push(self, tokens: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        return self._utf8.decode(b"".join(self._bytes_V[token] for token in tokens))


class TextStreamer:
    """Prints a text to a stream while it is generated; the prompt is left out.

    Args:
        tokenizer: of the run.
        stream: standard output when not given.
    """

    def __init__(self, tokenizer: Tokenizer, stream: TextIO | None = None) -> None:
        self._decoder, self._stream = TextDecoder(token_texts(tokenizer)), stream or sys.stdout

    def put(self, value: Tensor) -> None:
        """Prints the characters that a new token completes; ignores a prompt, shape (1, T)."""
        if value.dim() == 1:
            print(self._decoder.push(value.tolist()), end="", flush=True, file=self._stream)

    def end(self) -> None:
        """Does nothing: an incomplete character is not printed."""


def token_texts(tokenizer: Tokenizer) -> list[bytes]:
    """The UTF-8 bytes of each token; none for special tokens."""
    byte_of, added = byte_alphabet(), tokenizer.get_added_tokens_decoder()
    bytes_V = [b""] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            bytes_V[index] = bytes(byte_of[letter] for letter in token)
        elif not added[index].special:
            bytes_V[index] = token.encode()
    return bytes_V
