"""Every format gives the documents that went in, whatever the size of a piece, and says where it is cut."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.data import formats
from ltm_pyro.data.documents import read_documents
from ltm_pyro.errors import UsageError

TEXTS = ["one é", "two 😀\nlines", "three"]
JSONL = "".join(json.dumps({"text": text, "source": f"s{i}"}) + "\n" for i, text in enumerate(TEXTS)).encode()
PLAIN = "\n\n\n".join(TEXTS).encode()


def texts(*inputs):
    return [document.text for document in read_documents(inputs)]


@pytest.fixture(params=[1, 3, 7, 2**20])
def chunk(request, monkeypatch):
    """Reads files in pieces of so many bytes."""
    monkeypatch.setattr(formats, "_CHUNK", max(request.param, 8))
    return request.param


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["", ".gz", ".zst"])
def test_compressed_or_not_in_pieces_of_any_size(tmp_path, chunk, pack):
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(PLAIN))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(JSONL) + pack(JSONL) if suffix else JSONL * 2)
    assert texts(tmp_path) == TEXTS * 3


def test_labels_come_from_the_data_or_are_the_files_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(PLAIN)
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    assert [d.source for d in read_documents([tmp_path])] == ["a.txt"] * 3 + ["s0", "s1", "s2"]


def test_a_source_may_be_a_number(tmp_path):
    values = [2020, 0, 1.5, "2020", None, True, ["x"]]
    (tmp_path / "a.JSONL").write_text("".join(json.dumps({"text": "x", "source": value}) + "\n" for value in values))
    found = [d.source for d in read_documents([tmp_path / "a.JSONL"])]
    assert found == ["2020", "0", "1.5", "2020", "a.JSONL", "a.JSONL", "a.JSONL"]
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"text": ["x", "y"], "source": [7, None]}), tmp_path / "b.parquet")
    assert [d.source for d in read_documents([tmp_path / "b.parquet"])] == ["7", "b.parquet"]


@given(st.text(alphabet="ab\n\r é", max_size=60), st.integers(1, 9))
def test_txt_is_split_alike_whatever_the_pieces(tmp_path_factory, text, chunk):
    file = tmp_path_factory.mktemp("x") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        found = [record for record in formats.read_records(file) if record.text.strip()]
        pieces = formats._BREAK.split(text.rstrip("\r\n"))  # the last document too ends before its line's end
        assert [record.text for record in found] == [piece for piece in pieces if piece.strip()]
        lines = text.split("\n")
        for record in found:  # begins at its line
            assert "\n".join(lines[record.line - 1 :]).startswith(record.text)


def test_an_endless_text_is_cut_at_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 10)
    (tmp_path / "a.txt").write_text("four\nfour\nfour\nfour\n" + "x" * 25)
    assert texts(tmp_path / "a.txt") == ["four\nfour\n", "four\nfour\n", "x" * 10, "x" * 10, "x" * 5]


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b[: len(b) // 2], lambda b: b[:9] + b"\0\0" + b[11:]])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)])
def test_cut_and_damaged_streams_are_named(tmp_path, suffix, pack, damage):
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(damage(pack(JSONL * 50)))
    with pytest.raises(UsageError, match=re.escape(f"{file}")) as caught:
        texts(file)
    assert "\n" not in str(caught.value)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS, "source": ["x", "y", "z"], "n": [1, 2, 3]}), file, row_group_size=2)
    assert [(d.text, d.source) for d in read_documents([file])] == list(zip(TEXTS, "xyz", strict=True))
    pq.write_table(pa.table({"body": TEXTS}), file)
    with pytest.raises(UsageError, match=r'a.parquet row 1 has no string under the key "text"'):
        texts(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"cannot read \S+a.parquet as Parquet"):
        texts(file)


def test_a_data_set_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_bytes(JSONL)
    assert texts(f"hf:{tmp_path}/set") == TEXTS
    with pytest.raises(UsageError, match=rf"cannot read hf:{tmp_path}/no \("):
        texts(f"hf:{tmp_path}/no")


def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"a.txt.zst needs zstandard: pip install 'ltm-pyro\[zstd\]'"):
        texts(tmp_path)
