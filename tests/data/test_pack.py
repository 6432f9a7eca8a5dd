import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.documents import Document, read_documents
from ltm_pyro.data.manifest import SPLITS, read_manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.data.rows import Rows, pack_rows
from ltm_pyro.data.tokenizer import end_of_text, load_tokenizer, train_tokenizer
from ltm_pyro.errors import UsageError

TOKENIZER = train_tokenizer(["the cat sat on the mat"], 270)
END = end_of_text(TOKENIZER)


def cut(texts, seq_len, layout):
    """Rows of documents "t:0", "t:1"…"""
    documents = [Document(f"t:{i}", text, "t") for i, text in enumerate(texts)]
    parts = Rows.join([*pack_rows(documents, TOKENIZER, seq_len, layout)])
    return [parts.row(i) for i in range(len(parts))]


def texts_of(rows, tokenizer):
    """The documents behind the rows, read back from the tokens alone."""
    tokens = np.concatenate([row.tokens_T for row in rows])
    ends = np.flatnonzero(tokens == end_of_text(tokenizer))
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[part != end_of_text(tokenizer)]) for part in np.split(tokens, ends[:-1] + 1)]


@pytest.mark.parametrize("layout", ["documents", "stream"])
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.integers(1, 20))
def test_rows_lose_nothing(layout, texts, seq_len):
    rows = cut(texts, seq_len, layout)
    assert texts_of(rows, TOKENIZER) == texts
    assert [row.id for row in rows] == list(range(len(rows)))
    ends = [row.tokens_T[-1] == END for row in rows]
    short = [len(row.tokens_T) < seq_len for row in rows]
    assert not any(short[:-1]) if layout == "stream" else all(end for end, cut in zip(ends, short, strict=True) if cut)
    assert max(len(row.tokens_T) for row in rows) <= seq_len
    assert sum(row.bytes for row in rows) == sum(len(text.encode()) for text in texts)
    sizes = [len(TOKENIZER.encode(text, add_special_tokens=False).ids) + 1 for text in texts]
    begins = np.cumsum([0, *sizes])  # of the documents in the stream
    at = 0
    for row in rows:
        end = at + len(row.tokens_T)
        first, last = np.searchsorted(begins, [at, end - 1], "right") - 1
        assert [part.number for part in row.parts] == list(range(first, last + 1))
        assert [part.offset for part in row.parts] == [max(at - begins[n], 0) for n in range(first, last + 1)]
        assert [part.piece for part in row.parts] == (
            [(at - begins[first]) // seq_len] if layout == "documents" else [None] * (last + 1 - first)
        )
        at = end


def test_rows_name_their_documents():
    rows = cut(["xy", "z", "xyxyx"], 4, "stream")
    assert [[part[:3] for part in row.parts] for row in rows] == [
        [(0, None, 0), (1, None, 0)],
        [(1, None, 1), (2, None, 0)],
        [(2, None, 3)],
    ]
    assert [(len(row.tokens_T), row.bytes) for row in rows] == [(4, 3), (4, 3), (3, 2)]
    rows = cut(["xy", "z", "xyxyx"], 4, "documents")
    assert [row.parts[0][:3] for row in rows] == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 4)]
    assert [(len(row.tokens_T), row.bytes) for row in rows] == [(3, 2), (2, 1), (4, 4), (2, 1)]
    assert [row.parts[0].document.id for row in rows] == ["t:0", "t:1", "t:2", "t:2"]


def test_a_prompt_is_encoded_by_itself_and_counted():
    documents = [
        Document("a", "ththe cat", "t", prompt=2),
        Document("b", "the", "t"),
        Document("c", "x", "t", prompt=0),
    ]
    rows = Rows.join([*pack_rows(documents, TOKENIZER, 3)])
    prompt, rest = (TOKENIZER.encode(x, add_special_tokens=False).ids for x in ("th", "the cat"))
    first = [rows.row(i) for i in range(len(rows)) if rows.row(i).parts[0].number == 0]
    assert [t for row in first for t in row.tokens_T] == [*prompt, *rest, END]
    assert sum(row.prompt for row in first) == len(prompt)
    assert [rows.row(i).prompt for i in (len(rows) - 2, len(rows) - 1)] == [None, 0]


def test_pack_comes_back_as_the_documents(corpus, packed):
    tokenizer, manifest = load_tokenizer(packed / "tokenizer.json"), read_manifest(packed)
    back = {split: texts_of(list(PackedDataset.open(packed, split)), tokenizer) for split in SPLITS[:3]}
    texts = [document.text for document in read_documents([corpus])]
    assert sorted(back["train"] + back["val"] + back["test"]) == sorted(texts)
    assert back["train"] == [text for text in texts if text in back["train"]]
    for name, split in manifest.splits.items():
        rows = list(PackedDataset.open(packed, name))
        assert split.documents == len(back[name])
        assert split.sequences == len(rows) == sum(shard.sequences for shard in split.shards)
        assert split.tokens == sum(len(row.tokens_T) for row in rows) == sum(shard.tokens for shard in split.shards)
        assert split.bytes == sum(len(text.encode()) for text in back[name]) == sum(row.bytes for row in rows)
    assert len(manifest.splits["train"].shards) > 1
    assert {row.tokens_T.dtype for row in PackedDataset.open(packed, "val")} == {np.dtype(np.uint16)}


def test_equal_texts_fall_on_one_side(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {i % 7}"}) + "\n" for i in range(70)))
    pack([path], tmp_path / "out", tokenizer="bpe:260", seq_len=8, val_fraction=0.4, keep_together="exact")
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer.json")
    sides = [set(texts_of(list(PackedDataset.open(tmp_path / "out", side)), tokenizer)) for side in SPLITS[:3]]
    assert sum(map(len, sides)) == 7 == len(set.union(*sides))


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_two_texts_are_one_on_each_side(tmp_path, fraction):
    path = tmp_path / "a.txt"
    path.write_text("one text of some length\n\n\nanother text of some length")
    splits = pack(
        [path], tmp_path / "out", tokenizer="bpe:260", seq_len=8, val_fraction=fraction, test_fraction=0.0005
    ).splits
    assert (splits["train"].documents, splits["val"].documents) == (1, 1)


def test_nothing_is_held_out_of_one_document_or_at_fraction_zero(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("a single document of text")
    assert list(pack([tmp_path / "a.txt"], tmp_path / "one", tokenizer="bpe:260", seq_len=8).splits) == ["train"]
    manifest = pack([corpus], tmp_path / "all", tokenizer="bpe:260", seq_len=8, val_fraction=0.0, test_fraction=0.0)
    assert list(manifest.splits) == ["train"]


def test_tokenizer_is_trained_on_training_text_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abababababab\n\n\ncdcdcdcdcdcd")
    pack([path], tmp_path / "out", tokenizer="bpe:270", seq_len=2, val_fraction=0.5)
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer.json")
    (held_out,) = texts_of(list(PackedDataset.open(tmp_path / "out", "val")), tokenizer)
    assert len(tokenizer.encode(held_out).ids) == 12


def test_the_seed_moves_documents_and_a_saved_tokenizer_is_kept(corpus, packed, tmp_path):
    saved = str(packed / "tokenizer.json")
    manifest = pack([corpus], tmp_path / "out", tokenizer=saved, seq_len=16, val_fraction=0.2, seed=1)
    assert manifest.tokenizer_hash == read_manifest(packed).tokenizer_hash
    names = [
        {row.parts[0].number for row in PackedDataset.open(folder, "val")} for folder in (packed, tmp_path / "out")
    ]
    assert names[0] != names[1]


def test_another_process_writes_the_same_bytes(corpus, packed, tmp_path):
    code = "import sys; import ltm_pyro.data.shards as shards; shards.BLOCK = 8; "
    code += "from ltm_pyro.data.pack import pack; pack([sys.argv[1]], sys.argv[2], tokenizer='bpe:300', "
    code += "seq_len=16, val_fraction=0.2, test_fraction=0.1, shard_rows=20)"
    subprocess.run([sys.executable, "-c", code, str(corpus), str(tmp_path / "out")], check=True)
    assert digests(tmp_path / "out") == digests(packed)


def test_progress_is_told_of_every_token(corpus, tmp_path):
    told = []
    manifest = pack([corpus], tmp_path / "out", tokenizer="bpe:300", shard_rows=5, progress=told.append)
    assert sum(told) == sum(split.tokens for split in manifest.splits.values())


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


REFUSED = [
    ({"seq_len": 0}, "seq_len 0 leaves no token in a sequence; give at least 1."),
    ({"val_fraction": 1.0}, "val_fraction 1.0 leaves nothing to train on; give a number from 0 to below 1."),
    ({"test_fraction": -0.1}, "test_fraction -0.1 leaves nothing to train on"),
    ({"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction 0.6 and test_fraction 0.4 leave nothing to train on"),
    ({"labels": ["no"]}, "no document has the label 'no'; name a field of the records, or leave it out."),
    (
        {"id": "source"},
        "two documents have the id 'x' under 'source'; name a field that differs, or drop equal documents with",
    ),
    ({"val_fraction": float("nan")}, "val_fraction nan leaves nothing to train on"),
    ({"seq_len": 100_000, "rows": "stream"}, r"tokens, fewer than one sequence of 100000; add text or lower seq_len."),
    ({"tokenizer": "bpe:x"}, "tokenizer 'bpe:x' has no whole number"),
    ({"tokenizer": "no.json"}, "tokenizer no.json is not a file"),
    ({"inputs": []}, "no input was given; name a .txt, .jsonl or .parquet file or a folder of them."),
    ({"inputs": ["no.txt"]}, "no.txt does not exist"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refused_pack_leaves_nothing_behind(corpus, tmp_path, change, message):
    settings = {"inputs": [corpus], "out": tmp_path / "deep/out", "tokenizer": "bpe:260"} | change
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        pack(settings.pop("inputs"), settings.pop("out"), **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_equal_documents_cannot_be_divided(tmp_path):
    (tmp_path / "a.txt").write_text("same\n\n\nsame")
    with pytest.raises(
        UsageError, match="all 2 documents are the same or similar, so none can be held out; add others"
    ):
        pack([tmp_path / "a.txt"], tmp_path / "out", seq_len=2)
