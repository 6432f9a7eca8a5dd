"""Byte-level BPE: text to tokens and back without loss, each token a known number of UTF-8 bytes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ltm_pyro.errors import UsageError

END_OF_TEXT = "<|endoftext|>"  # follows every document, and is the start token of every sequence
SMALLEST_VOCABULARY = 257  # every byte and END_OF_TEXT
_WORD = 2**12  # characters
_RUN = re.compile(rf"(?<!\S)\S{{{_WORD + 1},}}|(?<!\s)\s{{{_WORD + 1},}}")
_PROBE = (
    "The quick-brown fox\u2019s 1,234 jumps!\r\n\t  A\u0308\u00c4 \ufb01 \u4f60\u597d \U0001f600\n\n " + END_OF_TEXT
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocabulary`` tokens learned from ``texts``; the same texts give the same tokenizer.

    A small text may give fewer tokens (`vocabulary_size`).
    """
    _check_vocabulary(vocabulary, f"bpe:{vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with no_panic("the texts"):
        tokenizer.train_from_iterator(_short_words(texts), trainer)
    return _as_plain_text(tokenizer)


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with words of over 4,096 characters cut: what a word costs to learn from grows with its square."""
    for text in texts:
        start = 0
        for run in _RUN.finditer(text):
            yield text[start : run.start()]
            yield from (run[0][i : i + _WORD] for i in range(0, len(run[0]), _WORD))
            start = run.end()
        yield text[start:]


@contextmanager
def no_panic(where: str) -> Iterator[None]:
    """Turns a panic of the library, which is no `Exception`, into a `UsageError` that names ``where`` it happened.

    It panics where a pattern of a tokenizer takes exponentially long, and elsewhere.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the tokenizer fails on {where} ({reason}); use another tokenizer, such as bpe:SIZE."
        ) from None


def number_tokenizer(vocabulary: int) -> Tokenizer:
    """The tokenizer of sequences that are no text: the token n is written as the number n, `END_OF_TEXT` is last."""
    words = {str(n): n for n in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words | {END_OF_TEXT: vocabulary}, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _as_plain_text(tokenizer)


def load_tokenizer(path: str | Path, content: bytes | None = None) -> Tokenizer:
    """The tokenizer saved at ``path``: byte-level or a `number_tokenizer`, with `END_OF_TEXT`; others are refused.

    Args:
        content: of that file, if it has been read already.
    """
    if content is None and not Path(path).is_file():
        raise UsageError(f"tokenizer {path} is not a file; give bpe:SIZE or the path of a tokenizer.json.")
    try:
        with no_panic(str(path)):
            tokenizer = Tokenizer.from_str((content or Path(path).read_bytes()).decode())
    except UsageError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{path} is not a Hugging Face tokenizer.json ({error}); give one or bpe:SIZE.") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UsageError(f"tokenizer {path} has no token {END_OF_TEXT}; add it as a special token or use bpe:SIZE.")
    tokenizer = _as_plain_text(tokenizer)
    if tokenizer_hash(tokenizer) == tokenizer_hash(number_tokenizer(end_of_text(tokenizer))):
        return tokenizer
    if not _is_byte_level(tokenizer):
        raise UsageError(f"tokenizer {path} does not keep every byte of a text; give a byte-level BPE or use bpe:SIZE.")
    if missing := {*pre_tokenizers.ByteLevel.alphabet()} - tokenizer.get_vocab(with_added_tokens=False).keys():
        raise UsageError(
            f"tokenizer {path} has no token for {len(missing)} of the 256 bytes, which texts would lose; "
            f"train it with initial_alphabet=ByteLevel.alphabet() or use bpe:SIZE."
        )
    return tokenizer


def parse_tokenizer(spec: str) -> int | Path:
    """``"bpe:4096"`` is the vocabulary of a tokenizer to train, anything else the path of a saved one."""
    if not spec.startswith("bpe:"):
        return Path(spec)
    size = spec.removeprefix("bpe:")
    if not size.isascii() or not size.isdigit():
        raise UsageError(f"tokenizer {spec!r} has no whole number after bpe:; write for example bpe:4096.")
    _check_vocabulary(int(size), spec)
    return int(size)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON, in hexadecimal."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of `END_OF_TEXT`, which is also the start token of every sequence."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert token is not None, "load_tokenizer has checked it"
    return token


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """V, one more than the largest token id."""
    return 1 + max(tokenizer.get_vocab().values())


def token_bytes(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """UTF-8 bytes of each token, 0 for special tokens; the sum over the tokens of a text is its length in bytes."""
    added = tokenizer.get_added_tokens_decoder()
    bytes_V = np.zeros(vocabulary_size(tokenizer), np.int64)
    if isinstance(tokenizer.model, models.WordLevel):  # of a `number_tokenizer`: no text
        return bytes_V
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            bytes_V[index] = len(token)  # one letter of the byte-level alphabet for each byte
        elif not added[index].special:
            bytes_V[index] = len(token.encode())
    return bytes_V


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrower of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)


def _check_vocabulary(vocabulary: int, spec: str) -> None:
    if vocabulary < SMALLEST_VOCABULARY:
        raise UsageError(f"tokenizer {spec} is too small for every byte; ask for at least bpe:{SMALLEST_VOCABULARY}.")


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Switches off truncation and padding, and encodes text that spells a special token as plain text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether a text with letters, marks, spaces and emoji is decoded unchanged, with every byte counted."""
    with no_panic("every text"):
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        whole = tokenizer.decode(ids, skip_special_tokens=False) == _PROBE
    return whole and int(token_bytes(tokenizer)[ids].sum()) == len(_PROBE.encode())
