import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.manifest import read_manifest, write_manifest
from ltm_pyro.data.pack import pack
from ltm_pyro.data.shards import damage, read_shard
from ltm_pyro.errors import UsageError
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.training.train import error_message


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def refused(folder, message, split="train"):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        list(PackedDataset.open(folder, split))
    assert "\n" not in str(caught.value)


def rewrite(folder, change):
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def members(path):
    """Where the headers of a tar file are."""
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


def cut(path, where):
    path.write_bytes(path.read_bytes()[:where])


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def swap(path):
    other = path.with_name("train-000001.tar")
    path.rename(path.with_suffix(".x"))
    other.rename(path)
    path.with_suffix(".x").rename(other)


def cut_gzip(path):
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])


DAMAGE = {
    "cut inside a member": lambda path: cut(path, members(path)[1] - 600),
    "cut at a member's border": lambda path: cut(path, members(path)[1]),
    "cut at a sample's border": lambda path: cut(path, members(path)[2]),
    "a later header damaged": lambda path: flip(path, members(path)[2] + 150),
    "a byte flipped in data": lambda path: flip(path, members(path)[0] + 512 + 200),
    "empty": lambda path: cut(path, 0),
    "missing": Path.unlink,
    "swapped": swap,
    "a cut .tar.gz": cut_gzip,
    "a corrupt gzip stream": lambda path: path.write_bytes(b"\x1f\x8b" + path.read_bytes()[2:]),
}


@pytest.fixture
def loader():
    """Makes the batches that training reads."""

    def make(folder, **settings):
        data = PackedData(str(folder), batch_size=8, **settings)
        data.setup("fit")
        return data.train_dataloader()

    return make


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_verification_and_by_training(copy, loader, kind):
    path = copy / "train-000000.tar"
    DAMAGE[kind](path)
    found = {file: problem for _, file, problem in damage(copy, read_manifest(copy)) if problem}
    assert path.name in found
    assert set(found) <= {path.name, "train-000001.tar"}
    with pytest.raises(UsageError, match=r"train-00000\d\.tar") as caught:
        list(loader(copy))
    assert "\n" not in str(caught.value)
    assert str(caught.value) in found.values()


def test_damage_found_by_a_worker_is_one_sentence(copy, loader):
    flip(copy / "train-000000.tar", 900)
    with pytest.raises(UsageError) as caught:
        list(loader(copy, workers=1))
    assert re.fullmatch(r"shard \S+ is damaged: its SHA-256 .* again\.", error_message(caught.value))


def test_damaged_shards_are_skipped_and_counted_on_demand(copy, loader):
    (copy / "train-000001.tar").unlink()
    flip(copy / "train-000002.tar", 900)
    whole = read_manifest(copy).splits["train"]
    with pytest.warns(
        UserWarning, match=r"2 of \d+ train shards skipped, 40 of \d+ sequences \(\S+1.tar, \S+2.tar\): .*1.tar"
    ):
        ids = [i for batch in loader(copy, on_damage="skip") for i in batch.ids_B.tolist()]
    assert sorted(ids) == [*range(20), *range(60, whole.sequences)]
    for path in copy.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match="all train shards of"):
        loader(copy, on_damage="skip")


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_damaged_held_out_shards_are_skipped_too(corpus, tmp_path, rows):
    out, options = tmp_path / "pack", {"tokenizer": "bpe:300", "seq_len": 16, "shard_rows": 20}
    pack([corpus], out, val_fraction=0.3, rows=rows, **options)
    whole = read_manifest(out).splits["val"]
    flip(out / "val-000000.tar", 900)
    data = PackedData(str(out), batch_size=8, on_damage="skip")
    with pytest.warns(UserWarning, match=rf"1 of {len(whole.shards)} val shards skipped, 20 of {whole.sequences} "):
        data.setup("fit")
    ids = [i for batch in data.val_dataloader() for i in batch.ids_B.tolist()]
    assert sorted(ids) == [*range(20, whole.sequences)]
    for path in out.glob("val-*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match="all val shards of"):
        data.setup("fit")


@pytest.mark.parametrize("hurt", [Path.unlink, lambda path: flip(path, 140)], ids=["missing", "flipped"])
def test_lengths_are_taken_from_the_shards_where_their_file_is_damaged(copy, loader, hurt):
    whole = [batch.ids_B.tolist() for batch in loader(copy)]
    for split in ("train", "val"):
        hurt(copy / f"{split}-lengths.npy")
    with pytest.raises(UsageError, match=r"train-lengths.npy"):
        loader(copy)
    with pytest.warns(UserWarning, match="the lengths of rows are taken from the (train|val) shards, because") as told:
        assert [batch.ids_B.tolist() for batch in loader(copy, on_damage="skip")] == whole
    assert len(told) == 2


@pytest.mark.parametrize("count", ["sequences", "tokens"])
def test_counts_are_checked_at_the_end(copy, count):
    shard = read_manifest(copy).splits["val"].shards[0]
    wrong = dataclasses.replace(shard, **{count: getattr(shard, count) + 1})
    with pytest.raises(UsageError, match=re.escape(f"{shard.file} is damaged: its {count} is")):
        list(read_shard(copy, read_manifest(copy), wrong, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 0}, "a count is no whole number above 0"),
        ({"vocabulary": 99}, "tokenizer.json is not the tokenizer of its manifest"),
        ({"splits": {"train": {"sequences": 9}}}, "a split's counts are not its shards'"),
        ({"splits": {"train": {"shards": []}}}, "a split's counts are not its shards'"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(copy, change, words):
    def contradict(raw):
        raw["splits"]["train"].update(change.get("splits", {}).get("train", {}))
        raw.update({name: value for name, value in change.items() if name != "splits"})

    rewrite(copy, contradict)
    with pytest.raises(UsageError, match=words):
        PackedDataset.open(copy)


def test_a_cache_that_is_no_folder_is_refused(copy, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"cannot keep shards in \S+/file: .* choose another data.cache"):
        PackedDataset.open(copy, "val", tmp_path / "file")[0]


@pytest.mark.parametrize("name", ["pipe:cat x", "../train-000000.tar", "/etc/passwd"])
def test_shards_outside_the_pack_are_refused(copy, name):
    rewrite(copy, lambda raw: raw["splits"]["train"]["shards"][0].update(file=name))
    refused(copy, f"names the shard {name!r}, which is not a file in it")


def test_addresses_that_run_something_are_refused():
    for place in ("pipe:cat x", "reference::file://x"):
        refused(place, f"{place} is neither a folder nor a plain address; give a path or https://")


def test_a_pack_is_read_from_an_address_and_kept_beside(packed, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.put(str(packed), "/bucket/pack", recursive=True)
    local = [row.tokens_T.tolist() for row in PackedDataset.open(packed)]
    remote = PackedDataset.open("memory://bucket/pack", cache=tmp_path / "cache")
    assert [row.tokens_T.tolist() for row in remote] == local
    fs.rm("/bucket/pack/train-000000.tar")
    again = PackedDataset.open("memory://bucket/pack", cache=tmp_path / "cache")
    assert again[0].tokens_T.tolist() == local[0]
    refused("memory://bucket/pack", "cannot read memory://bucket/pack/train-000000.tar")
    refused("memory://bucket/no", "cannot read memory://bucket/no/manifest.json")
    refused("gopher://bucket/pack", "cannot read gopher://bucket/pack/manifest.json: Protocol not known")


def test_a_pack_is_read_over_http(packed):
    handler = partial(SilentHandler, directory=str(packed.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        place = f"http://127.0.0.1:{server.server_port}/{packed.name}"
        try:
            rows = [row.tokens_T.tolist() for row in PackedDataset.open(place)]
            refused(f"{place}/no", f"cannot read {place}/no/manifest.json")
        finally:
            server.shutdown()
            thread.join()
    assert rows == [row.tokens_T.tolist() for row in PackedDataset.open(packed)]


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_pickled_arrays_are_not_loaded(copy):
    npy = io.BytesIO()
    np.save(npy, np.array([Bomb()], object))
    refuse_sample(copy, {"tokens.npy": npy.getvalue(), "meta.json": b"{}"})


def test_a_sample_without_a_field_is_refused(copy):
    refuse_sample(copy, {"meta.json": b"{}"})


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_the_bomb_works():
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(Bomb()))


def refuse_sample(folder, members):
    """Puts a shard of one sample, well signed, into the pack."""
    path = folder / "val-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"000000000.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = path.read_bytes()
    signed = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    rewrite(folder, lambda raw: raw["splits"]["val"]["shards"][0].update(signed))
    refused(folder, f"shard {path} has a sample that is not rows", "val")


def test_unknown_splits_and_folders_are_refused(packed, tmp_path):
    refused(packed, "has no split 'dev': choose train or val or test.", "dev")
    refused(tmp_path, f"{tmp_path} is not a packed corpus (no manifest.json); make one with `ltm data pack`.")


def test_manifests_that_cannot_be_understood_are_refused(copy):
    manifest = read_manifest(copy)
    write_manifest(dataclasses.replace(manifest, format=99), copy)
    refused(copy, "manifest.json has format 99, newer than the 3 of this version: update ltm_pyro.")
    write_manifest(dataclasses.replace(manifest, format=1), copy)
    refused(copy, "manifest.json has format 1, and this version reads 2 to 3; pack the text again.")
    (copy / "manifest.json").write_text('{"format": 2}')
    refused(copy, "manifest.json cannot be read as a manifest")
    (copy / "manifest.json").write_text("[]")
    refused(copy, "manifest.json cannot be read as a manifest")
