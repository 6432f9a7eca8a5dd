"""`ltm data verify` and `ltm data show`."""

import hashlib
import json
import shutil

import pytest


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def test_an_intact_pack_is_called_intact(packed, ltm):
    assert ltm("data", "verify", packed)[:2] == (0, f"{packed}: all 6 files are intact.\n")
    code, out, _ = ltm("data", "verify", packed, "--json")
    assert (code, json.loads(out)) == (0, {"pack": str(packed), "files": 6, "damaged": {}})


def test_damaged_shards_are_named(copy, ltm):
    shard = copy / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    code, out, err = ltm("data", "verify", copy)
    assert (code, err) == (2, f"ltm data verify: 1 of 6 files of {copy} are damaged: val-000000.tar.\n")
    assert out.startswith(f"shard {shard} is damaged: its size in bytes is ")
    code, out, _ = ltm("data", "verify", copy, "--json")
    assert (code, list(json.loads(out)["damaged"])) == (2, ["val-000000.tar"])


def test_show_counts_documents_by_length_and_decodes_sequences(packed, ltm):
    code, out, _ = ltm("data", "show", packed, "--json", "--samples", 2)
    shown = json.loads(out)
    assert code == 0
    assert sum(shown["lengths"].values()) == shown["splits"]["train"]["documents"]
    assert shown["sources"] == {"corpus.jsonl": shown["splits"]["train"]["sequences"]}
    assert all(sample["text"].strip() and sample["documents"] for sample in shown["samples"])
    code, out, _ = ltm("data", "show", packed, "--split", "val")
    assert code == 0
    assert "lengths of documents" in out
    assert "sequence " in out


def test_the_reader_is_timed(packed, ltm):
    code, out, _ = ltm("bench", "--data", packed, "--clock", "cpu")
    assert (code, list(json.loads(out)["tokens_per_second"])) == (0, ["0"])
    assert json.loads(out)["tokens_per_second"]["0"] > 0


def test_bad_packs_are_refused(packed, copy, refused, tmp_path):
    assert "not a packed corpus" in refused("data", "verify", tmp_path)
    assert "no split 'dev'" in refused("data", "show", packed, "--split", "dev")
    (copy / "tokenizer.json").unlink()
    assert "cannot read" in refused("data", "show", copy)


def test_damage_ends_training_in_one_sentence(copy, recipe, ltm, tmp_path):
    shard = copy / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    for workers in (0, 1):
        options = ("--data.directory", copy, "--data.workers", workers, "--run", tmp_path / f"run{workers}")
        code, _, err = ltm("fit", "--config", recipe, *options)
        assert code == 2
        assert err.splitlines()[-1].startswith(f"ltm fit: shard {shard} is damaged: its SHA-256 is ")


def test_verification_names_a_shard_that_cannot_be_right(copy, refused, ltm):
    path = copy / "val-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"bytes": [', b'"bytes":[-', 1))  # as long as before
    raw = json.loads((copy / "manifest.json").read_text())
    shard = raw["splits"]["val"]["shards"][0]
    shard |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    (copy / "manifest.json").write_text(json.dumps(raw))
    code, out, err = ltm("data", "verify", copy)
    assert code == 2
    assert "val-000000.tar" in out
    assert "Traceback" not in err
    assert "val-000000.tar" in refused("data", "show", copy, "--split", "val")
