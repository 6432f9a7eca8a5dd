"""`ltm data verify` and `ltm data show`."""

import hashlib
import json
import shutil
import subprocess
import sys

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


def test_a_damaged_file_of_lengths_is_named_and_can_be_done_without(copy, recipe, ltm, refused, tmp_path):
    (copy / "val-lengths.npy").write_bytes((copy / "val-lengths.npy").read_bytes()[:-1] + b"x")
    assert ltm("data", "verify", copy)[1].startswith(f"{copy / 'val-lengths.npy'} is damaged: its SHA-256 is ")
    options = ("--data.directory", copy, "--run", tmp_path / "run")
    code, _, err = ltm("fit", "--config", recipe, *options)
    assert (code, f"ltm fit: {copy / 'val-lengths.npy'} is damaged" in err) == (2, True)
    with pytest.warns(UserWarning, match="the lengths of rows are taken from the val shards"):
        code, _, err = ltm("fit", "--config", recipe, *options, "--data.on_damage", "skip")
    assert code == 0, err


def test_warnings_are_one_line_without_the_place_in_the_code(corpus, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(corpus, tmp_path / "folder")
    (tmp_path / "folder/picture").write_bytes(b"\0\xff")
    words = (sys.executable, "-P", "-m", "ltm_pyro.cli", "data", "pack", tmp_path / "folder", "--out", tmp_path / "out")
    err = subprocess.run([*words, "--tokenizer", "bpe:280"], capture_output=True, text=True, check=True).stderr
    what = "left out, because neither name nor content says that they are data"
    assert err == f"ltm data pack: warning: {what}: {tmp_path / 'folder'}/picture\n"


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


def test_show_says_where_a_row_begins_and_what_is_its_prompt(ltm, tmp_path):
    records = [{"prompt": "one two ", "completion": f"three {n} four", "year": n} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = (tmp_path / "a.jsonl", "--out", tmp_path / "pack", "--tokenizer", "bpe:257", "--seq-len", 16)
    assert ltm("data", "pack", *words, "--label", "year", "--test-fraction", 0)[0] == 0
    shown = json.loads(ltm("data", "show", tmp_path / "pack", "--samples", 50, "--json")[1])["samples"]
    assert {(x["offset"], x["prompt"]) for x in shown} == {(0, 8), (16, 0)}
    out = " ".join(ltm("data", "show", tmp_path / "pack", "--samples", 50)[1].split())
    assert "a.jsonl:2, 8 tokens of prompt, year: 1" in out
    assert "a.jsonl:2 from token 16, 0 tokens of prompt, year: 1" in out
    message = ltm("data", "show", tmp_path / "pack", "--split", "test")[2]
    expected = "has no split 'test': choose train or val, or pack the text again with a --test-fraction above 0.\n"
    assert message.endswith(expected)


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
