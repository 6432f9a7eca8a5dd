import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ltm_pyro.data.encode import text_pieces
from ltm_pyro.data.tokenizer import (
    END_OF_TEXT,
    end_of_text,
    load_tokenizer,
    parse_tokenizer,
    token_bytes,
    token_dtype,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from ltm_pyro.errors import UsageError

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


def _without_end(raw):
    raw["added_tokens"] = []
    del raw["model"]["vocab"][END_OF_TEXT]


def _with_prefix_space(raw):
    raw["pre_tokenizer"]["add_prefix_space"] = True


def _lowercasing(raw):
    raw["normalizer"] = {"type": "Lowercase"}


def _without_letters(raw):
    """As of training without an alphabet: the letters of bytes that the texts do not have."""
    for letter in "\u00d0\u00d1":
        del raw["model"]["vocab"][letter]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_end, "has no token <|endoftext|>; add it as a special token or use bpe:SIZE."),
        (_with_prefix_space, "does not keep every byte of a text; give a byte-level BPE or use bpe:SIZE."),
        (_lowercasing, "does not keep every byte of a text; give a byte-level BPE or use bpe:SIZE."),
        (_without_letters, "has no token for 2 of the 256 bytes, which texts would lose; train it with"),
    ],
)
def test_unfit_tokenizers_are_refused(tmp_path, change, message):
    raw = json.loads(TOKENIZER.to_str())
    change(raw)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(UsageError, match=re.escape(f"tokenizer {path} {message}")):
        load_tokenizer(path)


def test_missing_and_malformed_tokenizers_are_refused(tmp_path):
    with pytest.raises(UsageError, match=re.escape(f"tokenizer {tmp_path / 'no.json'} is not a file; give bpe:SIZE")):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_the_alphabet_has_every_byte():
    assert len(pre_tokenizers.ByteLevel.alphabet()) == 256
