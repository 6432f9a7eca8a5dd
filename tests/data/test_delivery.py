"""From documents to batches: every token of every document once an epoch, with its id, however it is read."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ltm_pyro.data.dataset import PackedDataset, load_text_or_pack
from ltm_pyro.data.documents import Fields, read_documents
from ltm_pyro.data.encode import encode_document, encode_prompt
from ltm_pyro.data.manifest import read_manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.errors import UsageError
from ltm_pyro.training.datamodule import PackedData

texts = st.lists(st.text("ab \n\u00e9", min_size=1, max_size=40).filter(str.strip), min_size=3, max_size=30)


def make_pack(folder, records, **options):
    (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)), "utf-8")
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0, "keep_together": "exact"}
    pack([folder / "a.jsonl"], folder / "pack", tokenizer="bpe:257", **fractions | options)
    return folder / "pack"


def read(data, rank, ranks, epoch=0, step=0):
    """The batches of one rank from a step on."""
    data.__dict__["_ranks"], data._position = (rank, ranks), (epoch, step)
    return [*data.train_dataloader()]


def tokens_by_document(batches):
    """The tokens of each document's pieces, put together by offset."""
    found = defaultdict(dict)
    for batch in batches:
        for tokens_T, mask_T, parts in zip(batch.targets_BT, batch.mask_BT, batch.parts, strict=True):
            (part,) = parts
            assert part.offset not in found[part.document.id]  # once
            found[part.document.id][part.offset] = tokens_T[mask_T].tolist()
    return {id: [t for _, piece in sorted(pieces.items()) for t in piece] for id, pieces in found.items()}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.integers(1, 9), st.integers(1, 3), st.integers(0, 20), st.integers(0, 2), st.data())
def test_every_token_of_every_document_once_an_epoch(tmp_path_factory, documents, seq_len, ranks, more, epoch, data):
    folder = tmp_path_factory.mktemp("law")
    place = make_pack(folder, [{"text": text} for text in documents], seq_len=seq_len, shard_rows=7)
    module = PackedData(str(place), tokens=seq_len + more)
    tokenizer = PackedDataset.open(place).tokenizer
    assume(read_manifest(place).splits["train"].sequences >= ranks)
    undisturbed = [read(module, rank, ranks, epoch) for rank in range(ranks)]
    delivered = tokens_by_document([batch for rank in undisturbed for batch in rank])
    assert delivered == {f"a.jsonl:{2 * n + 1}": encode_document(tokenizer, x) for n, x in enumerate(documents)}
    assert len({len(rank) for rank in undisturbed}) == 1
    assert all(len({x.inputs_BT.shape[1] for x in step}) == 1 for step in zip(*undisturbed, strict=True))
    stop = data.draw(st.integers(0, len(undisturbed[0]) - 1))
    for rank, whole in enumerate(undisturbed):
        resumed = read(PackedData(str(place), tokens=seq_len + more), rank, ranks, epoch, stop)
        assert [x.ids_B.tolist() for x in resumed] == [x.ids_B.tolist() for x in whole[stop:]]


def test_workers_do_not_change_what_comes(packed):
    alone, together = (PackedData(str(packed), batch_size=4, workers=n) for n in (0, 2))
    for one, other in zip(read(alone, 0, 1), read(together, 0, 1), strict=True):
        assert torch.equal(one.targets_BT, other.targets_BT)
        assert one.parts == other.parts


RECORDS = [
    {"text": "first", "year": 1, "source": "x"},
    {"text": "first", "year": "1"},
    {"text": " \n"},
    {"text": "third " * 30, "year": None},
    {"prompt": "what is ", "completion": "it", "year": True, "source": "y"},
    {"text": "last", "year": 2.5, "source": "x"},
]


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_documents_come_back_with_labels_and_types(tmp_path, rows):
    place = make_pack(tmp_path, RECORDS, seq_len=8, labels=["year", "source"], rows=rows)
    manifest = read_manifest(place)
    assert (manifest.labels["year"].kind, manifest.labels["year"].values) == ("category", ("1", 1, 2.5, True))
    assert (manifest.labels["source"].values, manifest.prompts) == (("x", "y"), 1)
    known = {part.number: part.document for row in PackedDataset.open(place) for part in row.parts}
    found = [known[n] for n in sorted(known)]
    assert [info.id for info in found] == [f"a.jsonl:{2 * n + 1}" for n in (0, 1, 3, 4, 5)]
    years = [info.labels["year"] for info in found]
    assert [(type(x), x) for x in years] == [(int, 1), (str, "1"), (type(None), None), (bool, True), (float, 2.5)]
    assert [info.labels["source"] for info in found] == ["x", None, None, "y", "x"]


def test_ids_keep_their_type(tmp_path):
    """1 and "1" are two documents; an id may come twice where only the first of equal documents is kept."""
    records = [{"text": f"text {n} " * n, "key": key} for n, key in enumerate([1, "1", 2**60, "a\u00e9"], start=1)]
    place = make_pack(tmp_path, [*records, records[0]], seq_len=8, id="key", drop_duplicates="exact")
    known = {part.number: part.document.id for row in PackedDataset.open(place) for part in row.parts}
    assert [(type(x), x) for _, x in sorted(known.items())] == [(type(r["key"]), r["key"]) for r in records]
    with pytest.raises(UsageError, match="two documents have the id 1 under 'key'; name a field that differs, or drop"):
        make_pack(tmp_path, [*records, {"text": "other", "key": 1}], seq_len=8, id="key", force=True)


def test_numbers_are_numbers(tmp_path):
    records = [{"text": f"text {n}", "year": n if n else None} for n in range(9)]
    assert read_manifest(make_pack(tmp_path, records, seq_len=8, labels=["year"])).labels["year"].kind == "number"


@pytest.mark.parametrize("bound", ["MOST_VALUES", "MOST_CHARACTERS"])
def test_a_label_with_very_many_values_is_kept_but_not_listed(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(f"ltm_pyro.data.manifest.{bound}", 5)
    records = [{"text": f"text {n}", "author": f"{n}", "year": n, "both": n or "0"} for n in range(9)]
    with pytest.warns(UserWarning, match="the label 'author' has more than .* the manifest does not list them"):
        place = make_pack(tmp_path, records, seq_len=8, labels=["author", "year", "both"])
    manifest = read_manifest(place)
    assert {name: (x.kind, x.values) for name, x in manifest.labels.items()} == {
        "author": ("text", ()),
        "year": ("number", ()),
        "both": ("text", ()),
    }
    known = {part.number: part.document for row in PackedDataset.open(place) for part in row.parts}
    names = ("author", "year", "both")
    assert [known[n].labels for n in sorted(known)] == [{name: r[name] for name in names} for r in records]


@pytest.mark.parametrize(("score", "observe"), [("all", "prompt"), ("completion", "all"), ("completion", "prompt")])
def test_what_is_scored_and_what_is_observed(tmp_path, score, observe):
    records = [{"prompt": "ab " * n, "completion": "é" * n, "n": n} for n in range(1, 9)]
    place = make_pack(tmp_path, records, seq_len=64, labels=["n"])
    dataset = PackedDataset.open(place, score=score, observe=observe)
    batch = dataset.collate([*dataset])
    tokens, seen, size = defaultdict(int), defaultdict(int), defaultdict(int)
    for mask_T, observed_T, bytes_, parts in zip(
        batch.mask_BT, batch.observed_BT, batch.bytes_B, batch.parts, strict=True
    ):
        n = parts[0].document.labels["n"]
        tokens[n], seen[n], size[n] = (
            tokens[n] + int(mask_T.sum()),
            seen[n] + int(observed_T.sum()),
            size[n] + int(bytes_),
        )
    for n in range(1, 9):
        prompt, completion = (len(encode_prompt(dataset.tokenizer, x)) for x in ("ab " * n, "é" * n))
        assert tokens[n] == completion + 1 + (score == "all") * prompt
        assert seen[n] == prompt + (observe == "all") * (completion + 1)
        assert size[n] == 2 * n + (score == "all") * 3 * n
    text = load_text_or_pack(tmp_path / "a.jsonl", dataset.tokenizer, 64, score=score, observe=observe)
    assert torch.equal(text.collate([*text]).mask_BT, batch.mask_BT)


def test_what_needs_documents_says_so(tmp_path):
    place = make_pack(tmp_path, [{"text": "ab"}, {"prompt": "a", "completion": "b"}], seq_len=4, rows="stream")
    with pytest.raises(UsageError, match="`score: completion` needs rows of documents, and those of the pack"):
        PackedDataset.open(place, score="completion")
    place = make_pack(tmp_path, [{"text": "ab"}, {"prompt": "a", "completion": "b"}], seq_len=4, force=True)
    with pytest.raises(UsageError, match="1 of 2 documents have no prompt, which `observe: prompt` needs"):
        PackedDataset.open(place, observe="prompt")
    place = make_pack(tmp_path, [{"prompt": "a" * 9, "completion": "b"}] * 2, seq_len=4, force=True)
    with pytest.raises(
        UsageError, match=r"4 rows of the split train of the pack .* are later pieces of documents long"
    ):
        PackedDataset.open(place, score="completion")
    with pytest.raises(UsageError, match=r"4 rows of the text are later pieces of documents longer than 4 tokens"):
        load_text_or_pack(tmp_path / "a.jsonl", PackedDataset.open(place).tokenizer, 4, observe="prompt")


def test_packs_of_format_2_are_streams_without_documents(tmp_path):
    """Written here as earlier versions did: padded rows, and names of documents that are not kept."""
    place = make_pack(tmp_path, [{"text": "abab"}, {"text": "b"}], seq_len=4, rows="stream")
    new = [row.tokens_T.tolist() for row in PackedDataset.open(place)]
    old = place.parent / "old"
    write_format_2(PackedDataset.open(place), old)
    dataset = PackedDataset.open(old)
    assert [row.tokens_T.tolist() for row in dataset] == new
    assert {row.parts for row in dataset} == {()}
    assert dataset.collate([*dataset]).parts is None
    with pytest.raises(UsageError, match="needs rows of documents"):
        PackedDataset.open(old, observe="prompt")
    assert read(PackedData(str(old), batch_size=1), 0, 1)


def write_format_2(dataset, out):
    import hashlib
    import io
    import tarfile

    out.mkdir()
    rows, end = [*dataset], dataset.tokenizer.token_to_id("<|endoftext|>")
    seq_len, lengths = dataset.manifest.seq_len, [len(row.tokens_T) for row in rows]
    padded = np.full((len(rows), seq_len), end, np.uint16)
    for n, row in enumerate(rows):
        padded[n, : len(row.tokens_T)] = row.tokens_T
    npy = io.BytesIO()
    np.save(npy, padded)
    meta = {
        "first": 0,
        "lengths": lengths,
        "bytes": [row.bytes for row in rows],
        "documents": [[["a:0", "a"]]] * len(rows),
    }
    with tarfile.open(out / "train-000000.tar", "w") as tar:
        for name, content in (("tokens.npy", npy.getvalue()), ("meta.json", json.dumps(meta).encode())):
            info = tarfile.TarInfo(f"000000000.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = (out / "train-000000.tar").read_bytes()
    counts = {"sequences": len(rows), "tokens": sum(lengths), "bytes": sum(row.bytes for row in rows)}
    shard = {"file": "train-000000.tar", "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} | counts
    manifest = {
        "format": 2,
        "tokenizer_hash": dataset.manifest.tokenizer_hash,
        "vocabulary": dataset.manifest.vocabulary,
        "seq_len": seq_len,
        "dropped": 0,
        "splits": {"train": {"documents": 2, "shards": [shard]} | counts},
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "tokenizer.json").write_text(dataset.tokenizer.to_str())


def test_ids_are_lines_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(["", json.dumps({"text": "x"}), "", json.dumps({"text": "y"})]))
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    for document in read_documents([tmp_path / "a.jsonl"], Fields()):
        assert json.loads(lines[int(document.id.split(":")[1]) - 1])["text"] == document.text


def test_a_group_of_similar_documents_is_in_any_split_as_often_as_a_single_one(tmp_path):
    """Its size must not decide: of many members the lowest hash is low, so that it says nothing about the group."""
    words = [[f"w{n}x{k}" for k in range(40)] for n in range(60)]
    texts = [" ".join([*group, f"end{i}"]) for group in words for i in range(12)]
    where = {"train": 0, "val": 0, "test": 0}
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        options = {"val_fraction": 0.2, "test_fraction": 0.2, "keep_together": "near", "seed": seed}
        manifest = read_manifest(make_pack(folder, [{"text": x} for x in texts], seq_len=512, **options))
        for name, split in manifest.splits.items():
            assert split.documents % 12 == 0
            where[name] += split.documents // 12
    assert sum(where.values()) == 240
    assert 25 < where["val"] < 71  # 48 expected; 4 standard deviations are 24
    assert 25 < where["test"] < 71


def test_ids_are_unique_where_names_are_not(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("one line\n")
    found = [document.id for document in read_documents([tmp_path / "a/x.txt", tmp_path / "b/x.txt"])]
    assert found == [f"{tmp_path}/a/x.txt:1", f"{tmp_path}/b/x.txt:1"]
    with pytest.raises(UsageError, match=r"a/x.txt is in the input 2 times: give it once"):
        [*read_documents([tmp_path / "a/x.txt", tmp_path / "a"])]
    monkeypatch.setattr("ltm_pyro.data.formats.LONGEST", 4)
    assert [document.id for document in read_documents([tmp_path / "a"])] == ["x.txt:1", "x.txt:1.1"]


def test_another_number_of_ranks_goes_on_only_if_no_sequence_is_lost(packed):
    one, two = PackedData(str(packed), batch_size=8), PackedData(str(packed), batch_size=4)
    whole = [{*batch.ids_B.tolist()} for batch in read(one, 0, 1)]
    both = [[{*batch.ids_B.tolist()} for batch in read(two, rank, 2)] for rank in (0, 1)]
    if len(both[0]) == len(whole):
        assert [a | b for a, b in zip(*both, strict=True)] == whole
    state = {"epoch": 0, "step": 3, "steps_per_epoch": len(whole) + 1, "skipped_shards": [], **one._identity(1)}
    with pytest.raises(UsageError, match=r"trained with steps per epoch \d+, but now it is \d+: some sequences"):
        one.load_state_dict(state)
    with pytest.raises(UsageError, match=r"trained with skipped shards \[1\], but now it is \[\]: some sequences"):
        one.load_state_dict(state | {"steps_per_epoch": len(whole), "skipped_shards": [1]})
    with pytest.raises(UsageError, match=r"with skipped val shards \[0\], but now it is \[\]: the held-out figures"):
        one.load_state_dict(state | {"steps_per_epoch": len(whole), "skipped_val_shards": [0]})
    one.load_state_dict(state | {"steps_per_epoch": len(whole)})
    assert one._position == (0, 3)
