import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ltm_pyro.data.dataset import PackedDataset, load_text_or_pack, pack_texts
from ltm_pyro.data.documents import read_documents
from ltm_pyro.data.manifest import SPLITS
from ltm_pyro.data.pack import pack
from ltm_pyro.data.tokenizer import end_of_text, train_tokenizer
from ltm_pyro.errors import UsageError


def tokens(dataset):
    return [row.tokens_T.tolist() for row in dataset]


def test_rows_come_by_index_from_shards_that_are_held_only_for_a_while(packed, monkeypatch):
    monkeypatch.setattr("ltm_pyro.data.dataset.MIXED", 1)
    dataset = PackedDataset.open(packed, "train")
    assert len(dataset.shards) > 2
    assert len(dataset) == dataset.manifest.splits["train"].sequences == len(list(dataset))
    for i in (0, len(dataset) - 1, 20, 19, 40):
        row = dataset[i]
        assert (row.id, row.tokens_T.dtype) == (i, np.uint16)
        assert len(dataset._loaded) <= 2
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_batches_score_every_token_once(packed):
    dataset = PackedDataset.open(packed, "val")
    split, start = dataset.manifest.splits["val"], end_of_text(dataset.tokenizer)
    batches = list(DataLoader(dataset, batch_size=7, collate_fn=dataset.collate))
    assert sum(int(batch.mask_BT.sum()) for batch in batches) == split.tokens
    assert sum(int(batch.bytes_B.sum()) for batch in batches) == split.bytes
    assert torch.cat([batch.ids_B for batch in batches]).tolist() == list(range(split.sequences))
    for batch in batches:
        assert (batch.inputs_BT[:, 0] == start).all()
        assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
        assert batch.targets_BT.dtype == torch.int64


def test_text_on_the_fly_is_cut_as_on_disk(corpus, packed, tmp_path):
    saved = str(packed / "tokenizer.json")
    pack([corpus], tmp_path / "all", tokenizer=saved, seq_len=16, val_fraction=0.0, test_fraction=0.0)
    stored = PackedDataset.open(tmp_path / "all")
    texts = [document.text for document in read_documents([corpus])]
    for dataset in (pack_texts(texts, stored.tokenizer, 16), load_text_or_pack(corpus, stored.tokenizer, 16)):
        assert tokens(dataset) == tokens(stored)
        assert [row.bytes for row in dataset] == [row.bytes for row in stored]
        split, expected = dataset.manifest.splits["val"], stored.manifest.splits["train"]
        assert (split.documents, split.tokens, split.bytes) == (expected.documents, expected.tokens, expected.bytes)
    again = load_text_or_pack(corpus, stored.tokenizer, 16)
    assert [row.parts[0].document.id for row in again] == [row.parts[0].document.id for row in stored]


def test_a_pack_gives_its_validation_split(packed):
    tokenizer = PackedDataset.open(packed).tokenizer
    dataset = load_text_or_pack(packed, tokenizer, 64)
    assert tokens(dataset) == tokens(PackedDataset.open(packed, "val"))


def test_a_pack_of_another_vocabulary_or_length_is_refused(packed):
    dataset = PackedDataset.open(packed)
    other = train_tokenizer(["other text"], 260)
    hashed = dataset.manifest.tokenizer_hash[:12]
    with pytest.raises(UsageError, match=re.escape(f"pack {packed} has another tokenizer ({hashed}, 300 tokens) than")):
        load_text_or_pack(packed, other, 16)
    with pytest.raises(UsageError, match=r"sequences of 16 tokens, longer than the model's 8; pack .* --seq-len 8"):
        load_text_or_pack(packed, dataset.tokenizer, 8)


def test_a_pack_whose_tokenizer_was_exchanged_is_refused(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / "tokenizer.json").write_text(train_tokenizer(["other text"], 260).to_str())
    with pytest.raises(UsageError, match=r"tokenizer.json is not the tokenizer of its manifest; pack the text again."):
        PackedDataset.open(copy)


def test_no_text_is_refused():
    tokenizer = train_tokenizer(["text"], 260)
    with pytest.raises(UsageError, match="no text was given to pack; give at least one document"):
        pack_texts([], tokenizer, 8)
    with pytest.raises(UsageError, match="seq_len 0 leaves no token"):
        pack_texts(["a"], tokenizer, 0)


def test_the_command_prints_a_table_or_one_object(corpus, tmp_path, capsys):
    import argparse

    from ltm_pyro.cli.data import add_arguments, run

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", "bpe:300", "--seq-len", "16"]
    assert run(parser.parse_args([*arguments, "--json"])) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert {name: split["shards"] for name, split in summary["splits"].items()} == dict.fromkeys(SPLITS[:3], 1)
    assert summary["seq_len"] == 16
    assert captured.err == ""
    assert run(parser.parse_args([*arguments, "--force"])) == 0
    assert f"{summary['splits']['train']['tokens']:,}" in capsys.readouterr().out
