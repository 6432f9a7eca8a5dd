import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from ltm_pyro.data.encode import text_pieces
from ltm_pyro.data.tokenizer import (
    END_OF_TEXT,
    end_of_text,
    load_tokenizer,
    parse_tokenizer,
    short_words,
    token_bytes,
    token_dtype,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from ltm_pyro.errors import UsageError
from ltm_pyro.text.streaming import token_texts

TEXTS = ["the cat sat on the mat, the cat sat", "naïve café 你好 😀"] * 3
TOKENIZER = train_tokenizer(TEXTS, 280)
BYTES = token_bytes(TOKENIZER)


@given(st.text())
def test_text_comes_back_whole_and_every_byte_is_counted(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert BYTES[ids].sum() == len(text.encode())


def test_spelling_the_special_token_is_only_text():
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b").ids
    assert end_of_text(TOKENIZER) not in ids
    assert BYTES[ids].sum() == len(f"a{END_OF_TEXT}b")
    assert BYTES[end_of_text(TOKENIZER)] == 0


def test_training_is_deterministic_and_saving_keeps_the_hash(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_str(pretty=True), "utf-8")
    assert tokenizer_hash(train_tokenizer(iter(TEXTS), 280)) == tokenizer_hash(TOKENIZER)
    assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(TOKENIZER)
    assert tokenizer_hash(train_tokenizer(TEXTS, 279)) != tokenizer_hash(TOKENIZER)


@pytest.mark.parametrize("length", [400, 40_000, 4_000_000])
def test_what_is_learned_from_a_text_without_spaces_grows_with_its_logarithm(length):
    text = "".join(random.Random(0).choices("ACGT", k=length))
    pieces = [*filter(None, short_words([text[: length // 2], text[length // 2 :]], 260))]
    cut = length / 32
    assert max(map(len, pieces)) <= 32
    assert all(piece in text for piece in pieces)
    assert len(pieces) == pytest.approx(cut if cut < 260 else 260 * (1 + math.log(cut / 260)), rel=0.05, abs=2)


def test_words_are_all_learned_from():
    texts = ["a word\n and " + "x" * 32 + " " * 32 + "\ttoo, ", "", "the rest"]
    assert "".join(short_words(texts, 260)) == "".join(texts)


def test_sizes():
    assert vocabulary_size(TOKENIZER) == len(BYTES) == 280
    assert vocabulary_size(train_tokenizer(["ab"], 4096)) < 300
    assert token_dtype(TOKENIZER) == np.uint16


def test_a_wide_vocabulary_needs_32_bits():
    assert token_dtype(Tokenizer(models.BPE({"a": 2**16 - 1}, []))) == np.uint16
    assert token_dtype(Tokenizer(models.BPE({"a": 2**16}, []))) == np.uint32


def test_loading_takes_truncation_and_padding_off(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    path.write_text(tokenizer.to_str(), "utf-8")
    assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(TOKENIZER)


@given(st.lists(st.sampled_from(["a", "bc ", " ", "\n", ". "]), max_size=30))
def test_pieces_join_to_the_text_and_encode_to_the_same_tokens(words):
    text = "".join(words)
    pieces = list(text_pieces(text * 2000)) if text else [""]
    assert "".join(pieces) == (text * 2000 if text else "")
    assert all(len(piece) <= 2**17 for piece in pieces)
    if len(pieces) > 1 and not re.search(r"\S \S", text * 2):
        return  # cut where a word may go on
    whole = TOKENIZER.encode("".join(pieces)).ids
    assert [i for piece in pieces for i in TOKENIZER.encode(piece).ids] == whole


def test_specs():
    assert parse_tokenizer("bpe:4096") == 4096
    assert str(parse_tokenizer("runs/tokenizer.json")) == "runs/tokenizer.json"
    with pytest.raises(UsageError, match=r"'bpe:4k' has no whole number after bpe:; write for example bpe:4096\."):
        parse_tokenizer("bpe:4k")
    with pytest.raises(UsageError, match="bpe:256 is too small for every byte; ask for at least bpe:257"):
        parse_tokenizer("bpe:256")


def _changed(**changes):
    """The tokenizer's JSON with other parts; a dictionary changes what is inside a part."""
    raw = json.loads(TOKENIZER.to_str())
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(raw[name], dict) and "type" not in value:
            raw[name] |= value
        else:
            raw[name] = value
    return raw


def _without(*tokens):
    raw = _changed(added_tokens=[])
    for token in tokens:
        del raw["model"]["vocab"][token]
    return raw


def _with_token(content, special=False, **options):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(content, special=special, **options)])
    return json.loads(tokenizer.to_str())


def _saved(raw, folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(raw), "utf-8")
    return path


BYTE_LEVEL = json.loads(TOKENIZER.to_str())["pre_tokenizer"]
SPACES = {"type": "Split", "pattern": {"Regex": r"\s+"}, "invert": False}


def _sequence(kind, *parts):
    return {"type": "Sequence", kind: [*parts]}


KEPT = {
    "as GPT-2": _changed(),
    "as Llama 3": _changed(
        pre_tokenizer=_sequence("pretokenizers", SPACES | {"behavior": "Isolated"}, BYTE_LEVEL | {"use_regex": False})
    ),
    "an empty normalizer": _changed(normalizer=_sequence("normalizers")),
    "no dropout": _changed(model={"dropout": 0.0}),
    "digits": _changed(
        pre_tokenizer=_sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, BYTE_LEVEL)
    ),
    "punctuation": _changed(
        pre_tokenizer=_sequence("pretokenizers", {"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL)
    ),
    "pieces": _changed(pre_tokenizer=_sequence("pretokenizers", {"type": "FixedLength", "length": 5}, BYTE_LEVEL)),
    "words added": _with_token("cat sat"),
    "letters added": _with_token("\u4f60"),
    "special": _with_token("<s>", special=True, lstrip=True),
}


@pytest.mark.parametrize("raw", KEPT.values(), ids=KEPT.keys())
def test_an_accepted_tokenizer_gives_every_text_and_every_byte_back(raw, tmp_path):
    tokenizer = load_tokenizer(_saved(raw, tmp_path))
    sizes, texts_V = token_bytes(tokenizer), token_texts(tokenizer)
    single = [chr(x) for x in range(256)]  # in UTF-8 these and the two below have all bytes that occur in it
    wide = [chr(x << 12 | 0x3F) for x in [*range(13), 14, 15, *range(16, 0x110, 16)]]

    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(texts_V[index] for index in ids) == text.encode()
        assert sizes[ids].sum() == len(text.encode())
        assert end_of_text(tokenizer) not in ids

    for text in [*single, *wide, "".join(single), " cat sat \u4f60 <s> ", END_OF_TEXT]:
        check(text)
    every = sorted(texts_V[tokenizer.token_to_id(letter)] for letter in pre_tokenizers.ByteLevel.alphabet())
    assert every == [bytes([x]) for x in range(256)]
    draw = random.Random(0)
    planes = [(0, 0x80), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(10_000):
        check("".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randrange(12))))
    words = st.sampled_from(["cat sat", " cat", "\u4f60", "<s>", END_OF_TEXT, "12", "  "])
    texts = st.lists(st.one_of(st.text(max_size=20), words), max_size=6).map("".join)
    settings(max_examples=200, deadline=None, database=None)(given(texts)(check))()


LOST = {
    "no end": (_without(END_OF_TEXT), "has no token <|endoftext|>; add it as a special token"),
    "an end that is no special token": (
        _changed(added_tokens=[json.loads(TOKENIZER.to_str())["added_tokens"][0] | {"special": False}]),
        "loses text: its token <|endoftext|> is not special",
    ),
    "a space before": (_changed(pre_tokenizer={"add_prefix_space": True}), "its pre-tokenizer ByteLevel changes texts"),
    "lower case": (_changed(normalizer={"type": "Lowercase"}), "its normalizer Lowercase changes texts"),
    "NFC": (_changed(normalizer=_sequence("normalizers", {"type": "NFC"})), "its normalizer NFC changes texts"),
    "Strip": (
        _changed(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        "its normalizer Strip changes texts",
    ),
    "Replace": (
        _changed(normalizer={"type": "Replace", "pattern": {"String": "q"}, "content": "k"}),
        "its normalizer Replace changes texts",
    ),
    "Replace when it is decoded": (
        _changed(
            decoder=_sequence("decoders", BYTE_LEVEL, {"type": "Replace", "pattern": {"String": "q"}, "content": "k"})
        ),
        "its decoder is not ByteLevel alone",
    ),
    "Strip when it is decoded": (
        _changed(decoder=_sequence("decoders", BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 1, "stop": 0})),
        "its decoder is not ByteLevel alone",
    ),
    "scripts": (  # which drops the spaces at the beginning
        _changed(pre_tokenizer=_sequence("pretokenizers", {"type": "UnicodeScripts"}, BYTE_LEVEL)),
        "its pre-tokenizer UnicodeScripts changes texts",
    ),
    "spaces removed": (
        _changed(pre_tokenizer=_sequence("pretokenizers", SPACES | {"behavior": "Removed"}, BYTE_LEVEL)),
        "its pre-tokenizer Split changes texts",
    ),
    "bytes of bytes": (
        _changed(pre_tokenizer=_sequence("pretokenizers", BYTE_LEVEL, BYTE_LEVEL)),
        "its pre-tokenizer needs ByteLevel once",
    ),
    "dropout": (_changed(model={"dropout": 0.1}), "its dropout of 0.1 gives a text other tokens every time"),
    "the end of a word": (
        _changed(model={"end_of_word_suffix": "</w>"}),
        "its end_of_word_suffix is no part of a text",
    ),
    "letters missing": (
        _without("\u00d0", "\u00d1") | {"added_tokens": json.loads(TOKENIZER.to_str())["added_tokens"]},
        "it has no token for 2 of the 256 bytes: train it with initial_alphabet=ByteLevel.alphabet()",
    ),
    "an added token that takes spaces": (
        _with_token("cat", lstrip=True),
        "its added token 'cat' swallows the spaces beside it",
    ),
    "an added token that is a letter for a byte": (
        _with_token("\u0120"),
        "its added token '\u0120' is decoded as another text",
    ),
    "a special token in words": (_with_token("the", special=True), "its special token 'the' may be part of a text"),
}


@pytest.mark.parametrize(("raw", "message"), LOST.values(), ids=LOST.keys())
def test_a_tokenizer_that_loses_text_is_refused(raw, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_tokenizer(_saved(raw, tmp_path))


def test_missing_and_malformed_tokenizers_are_refused(tmp_path):
    with pytest.raises(UsageError, match=re.escape(f"tokenizer {tmp_path / 'no.json'} is not a file; give bpe:SIZE")):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_the_alphabet_has_every_byte():
    assert len(pre_tokenizers.ByteLevel.alphabet()) == 256
