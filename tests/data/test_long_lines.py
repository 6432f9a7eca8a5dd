"""Lines of any length are read and cut in linear time; too long a line, and too slow a tokenizer, are one sentence."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from ltm_pyro.data import encode, formats
from ltm_pyro.data.documents import read_documents
from ltm_pyro.data.encode import encode_prompt, text_pieces
from ltm_pyro.data.pack import pack
from ltm_pyro.data.tokenizer import load_tokenizer, train_tokenizer
from ltm_pyro.errors import UsageError

KINDS = {
    "letters": "abcdefghij",
    "words": "hello world ",
    "spaces": " ",
    "pairs": "ab  cd  ",
    "chinese": "\u4f60\u597d\u3002",
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_bounded_whatever_the_text_is(kind):
    text = (KINDS[kind] * 2**20)[: 2**20]
    pieces = list(text_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2**17
    assert 8 <= len(pieces) <= 16


def test_the_work_of_cutting_grows_with_the_text(monkeypatch):
    class Counted:
        """A pattern that counts the characters that it may look at."""

        def __init__(self, pattern):
            self.pattern = pattern

        def search(self, text, start, end):
            work.append(min(end, len(text)) - start)
            return self.pattern.search(text, start, end)

    monkeypatch.setattr(encode, "_CUTS", tuple(map(Counted, encode._CUTS)))
    totals = []
    for size in (2**20, 2**21, 2**22):
        work = []
        list(text_pieces("a" * size))
        totals.append(sum(work))
    assert totals[1] < 2.3 * totals[0]
    assert totals[2] < 2.3 * totals[1]


def test_a_piece_ends_at_a_space_else_behind_a_word():
    assert text_pieces("a" * 2**16 + "." + "b" * 2**17).__next__() == "a" * 2**16
    assert text_pieces("a" * 2**16 + ".b c" + "b" * 2**17).__next__() == "a" * 2**16 + ".b"


@pytest.mark.parametrize("name", ["line.txt", "line.jsonl"])
def test_a_line_of_eight_million_letters_is_packed(tmp_path, name):
    text = "abcdefghijklmnop" * 2**19
    (tmp_path / name).write_text(text if name.endswith("txt") else json.dumps({"text": text}))
    manifest = pack([tmp_path / name], tmp_path / "out", tokenizer="bpe:300", val_fraction=0, test_fraction=0)
    assert manifest.splits["train"].bytes == len(text)


@pytest.mark.parametrize("name", ["line.txt.gz", "line.jsonl.gz"])
@pytest.mark.parametrize("head", ["", "a line before\n"])
def test_a_line_that_is_decompressed_without_end_is_one_sentence(tmp_path, monkeypatch, name, head):
    monkeypatch.setattr(formats, "LONGEST_LINE", 2**24)
    path = tmp_path / name
    with gzip.open(path, "wb", 1) as file:
        file.write((head if "txt" in name else json.dumps({"text": head}) + "\n").encode() + b"{" * 2**25)
    with pytest.raises(UsageError, match=r"line\S+ has a line of more than 16,777,216 characters; .* LTM_LONGEST_LINE"):
        list(read_documents([path]))


def test_the_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    monkeypatch.setenv("LTM_LONGEST_LINE", "50")
    with pytest.raises(UsageError, match="more than 50 characters"):
        list(read_documents([path]))
    path.write_text("x" * 50 + "\n" + "y" * 50)
    assert len(list(read_documents([path]))) == 1
    path.write_text("x\n" + "y" * 51 + "\nz")
    with pytest.raises(UsageError, match="more than 50 characters"):
        list(read_documents([path]))
    monkeypatch.setenv("LTM_LONGEST_LINE", "100")
    assert len(list(read_documents([path]))) == 1
    for wrong in ("", "-1", "many", "1e9", "9" * 30):
        monkeypatch.setenv("LTM_LONGEST_LINE", wrong)
        with pytest.raises(UsageError, match="LTM_LONGEST_LINE is"):
            list(read_documents([path]))


@pytest.mark.parametrize("form", ["x.parquet", "hf:"])
def test_a_text_in_a_table_has_the_same_limit(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts, folder = ["short", "x" * 50, "y" * 51], tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts, "source": ["z" * 60] * 3}), folder / "x.parquet")
    place = f"hf:{folder}" if form == "hf:" else folder / form
    monkeypatch.setenv("LTM_LONGEST_LINE", "51")
    assert [document.text for document in read_documents([place])] == texts
    monkeypatch.setenv("LTM_LONGEST_LINE", "50")
    where = "record 3" if form == "hf:" else "x.parquet row 3"
    with pytest.raises(UsageError, match=rf"{where} has a text of more than 50 characters; .* LTM_LONGEST_LINE"):
        list(read_documents([place]))


def test_a_table_whose_rows_share_one_long_text_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * 1000]))
    pq.write_table(pa.table({"text": one}), tmp_path / "x.parquet")
    sizes, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(formats, "_AT_ONCE", 20_000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, size: sizes.append(size) or read(self, size))
    assert len(list(read_documents([tmp_path / "x.parquet"]))) == 100
    assert len(sizes) == 1
    assert 1 <= sizes[0] <= 20


@pytest.fixture
def catastrophic(tmp_path):
    """A tokenizer whose pattern takes exponentially long for a row of equal letters."""
    raw = json.loads(train_tokenizer(["the old model"], 257).to_str())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    return path


def test_a_tokenizer_that_panics_is_one_sentence(tmp_path, catastrophic, capfd):
    tokenizer = load_tokenizer(catastrophic)
    text = "x" * 40
    with pytest.raises(BaseException, match=r"retry-limit|[Ee]rr") as panic:
        Tokenizer.from_str(tokenizer.to_str()).encode(text)
    assert type(panic.value).__name__ == "PanicException"
    with pytest.raises(UsageError, match="the tokenizer fails on the text 'xxx"):
        encode_prompt(tokenizer, text)
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UsageError, match=r"the tokenizer fails on the documents from a.txt:1 on .* bpe:SIZE") as caught:
        pack([tmp_path / "a.txt"], tmp_path / "out", tokenizer=str(catastrophic), val_fraction=0, test_fraction=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
