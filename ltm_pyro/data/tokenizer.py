"""Byte-level BPE: text to tokens and back without loss, each token a known number of UTF-8 bytes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ltm_pyro.errors import UsageError

END_OF_TEXT = "<|endoftext|>"  # follows every document, and is the start token of every sequence
SMALLEST_VOCABULARY = 257  # every byte and END_OF_TEXT
KEEP_TEXT = ("ByteLevel", "Digits", "FixedLength", "Punctuation", "Split")  # pre-tokenizers; not UnicodeScripts
_WORD = 32  # bytes: of longer words, such as lines without a space, pieces are learned from
_RUN = re.compile(r"(?<!\S)\S{9,}|(?<!\s)\s{33,}")  # may be longer: a character has at most 4 bytes


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
        tokenizer.train_from_iterator(short_words(texts, vocabulary), trainer)
    return _as_plain_text(tokenizer)


def short_words(texts: Iterable[str], vocabulary: int) -> Iterator[str]:
    """The texts, with words of over 32 bytes cut into pieces, of which the n-th is kept with frequency V / n.

    What a word costs to learn from grows with its square, and what a text without spaces costs with the number of its
    different words: nearly all of its pieces are different. V (1 + log(n / V)) of n pieces are kept.
    """
    pieces, kept = 0, 0.0
    for text in texts:
        start = 0
        for run in _RUN.finditer(text):
            size, length = len(run[0].encode("utf-8", "replace")), len(run[0])
            if size <= _WORD:
                continue
            yield text[start : run.start()]
            step = max(1, _WORD * length // size)  # characters of a piece
            for first in range(run.start(), run.end(), step):
                pieces += 1
                kept += min(1.0, vocabulary / pieces)
                if kept >= 1:
                    kept -= 1
                    yield text[first : min(first + step, run.end())]
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
    of_numbers = isinstance(tokenizer.model, models.WordLevel)
    if of_numbers and tokenizer_hash(tokenizer) == tokenizer_hash(number_tokenizer(end_of_text(tokenizer))):
        return tokenizer
    if reason := _what_is_lost(tokenizer):
        raise UsageError(f"tokenizer {path} loses text: {reason}; give a byte-level BPE or use bpe:SIZE.")
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


def _what_is_lost(tokenizer: Tokenizer) -> str | None:
    """Why some text would not come back from its tokens, or not be the same tokens every time; None if all would.

    It is read off the tokenizer's parts: each of them has to be one that keeps every text.
    """
    parts = json.loads(tokenizer.to_str())
    model, added = parts["model"], tokenizer.get_added_tokens_decoder()
    if changing := _flat(parts["normalizer"], "normalizers"):
        return f"its normalizer {changing[0]['type']} changes texts"
    before = _flat(parts["pre_tokenizer"], "pretokenizers")
    for part in before:
        keeps = part["type"] in KEEP_TEXT and str(part.get("behavior")).lower() != "removed"
        if not keeps or part.get("add_prefix_space"):
            return f"its pre-tokenizer {part['type']} changes texts"
    if [part["type"] for part in before].count("ByteLevel") != 1:
        return "it is not byte-level: its pre-tokenizer needs ByteLevel once"
    if [part["type"] for part in _flat(parts["decoder"], "decoders")] != ["ByteLevel"]:
        return "its decoder is not ByteLevel alone"
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if model.get("dropout"):
        return f"its dropout of {model['dropout']} gives a text other tokens every time"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"its {name} is no part of a text"
    letters = byte_alphabet().keys()
    learned = tokenizer.get_vocab(with_added_tokens=False)
    if missing := letters - learned.keys():
        return (
            f"it has no token for {len(missing)} of the 256 bytes: train it with initial_alphabet=ByteLevel.alphabet()"
        )
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    from_text = {*learned} if model.get("ignore_merges") else {*letters, *map("".join, pairs)}
    contents = {token.content for token in added.values()}
    if strange := [token for token in learned if token not in contents and not letters >= {*token}]:
        return f"its token {strange[0]!r} is not made of bytes"
    if end_of_text(tokenizer) not in added or not added[end_of_text(tokenizer)].special:
        return f"its token {END_OF_TEXT} is not special, so that texts may spell it"
    for index, token in added.items():
        if token.special and token.content in from_text:
            return f"its special token {token.content!r} may be part of a text"
        if not token.special and (token.lstrip or token.rstrip):
            return f"its added token {token.content!r} swallows the spaces beside it"
        if not token.special and tokenizer.decode([index]) != token.content:
            return f"its added token {token.content!r} is decoded as another text"
    return None


def _flat(part: Any, inside: str) -> list[dict[str, Any]]:
    """The parts of a part of a tokenizer, whose sequences may have sequences in them; none of None."""
    if part is None:
        return []
    return [x for one in part[inside] for x in _flat(one, inside)] if part["type"] == "Sequence" else [part]


def byte_alphabet() -> dict[str, int]:
    """Letter to byte in byte-level BPE: printable Latin-1 bytes are their own letters, the others U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
