import dataclasses
import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest

from ltm_pyro.contracts import UsageError
from ltm_pyro.data.manifest import read_manifest, write_manifest
from ltm_pyro.data.shards import read_rows, read_shard


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def refused(folder, message, split="train"):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        list(read_rows(folder, split))
    assert "\n" not in str(caught.value)


def rewrite(folder, change):
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1024], lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:], lambda b: b""]
)
def test_a_damaged_shard_is_named(copy, damage):
    shard = copy / "train-000001.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    refused(copy, f"shard {shard} is damaged: its SHA-256 is")


def test_a_missing_shard_is_named(copy):
    (copy / "val-000000.tar").unlink()
    refused(copy, f"cannot read shard {copy}/val-000000.tar: No such file or directory; restore it", "val")


@pytest.mark.parametrize("count", ["sequences", "tokens"])
def test_counts_are_checked_at_the_end(copy, count):
    shard = read_manifest(copy).splits["val"].shards[0]
    wrong = dataclasses.replace(shard, **{count: getattr(shard, count) + 1})
    with pytest.raises(UsageError, match=re.escape(f"{shard.file} is damaged: its {count} is")):
        list(read_shard(copy, wrong))


@pytest.mark.parametrize("name", ["pipe:cat x", "../train-000000.tar", "/etc/passwd"])
def test_shards_outside_the_pack_are_refused(copy, name):
    rewrite(copy, lambda raw: raw["splits"]["train"]["shards"][0].update(file=name))
    refused(copy, f"names the shard {name!r}, which is not a file in it")


@pytest.mark.parametrize("directory", ["pipe:cat x", "https://example.com/pack"])
def test_addresses_are_refused(directory):
    refused(directory, f"{directory} is not a folder; copy the pack to this machine")


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
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, lambda raw: raw["splits"]["val"]["shards"][0].update(sha256=digest))
    refused(folder, f"shard {path} has a sample that is not a row", "val")


def test_unknown_splits_and_folders_are_refused(packed, tmp_path):
    refused(packed, "has no split 'test' but ['train', 'val']", "test")
    refused(tmp_path, f"{tmp_path} is not a packed corpus (no manifest.json); make one with `ltm data pack`.")


def test_manifests_that_cannot_be_understood_are_refused(copy):
    manifest = read_manifest(copy)
    write_manifest(dataclasses.replace(manifest, format=99), copy)
    refused(copy, "manifest.json has format 99, and this version reads 1; pack the text again.")
    (copy / "manifest.json").write_text('{"format": 1}')
    refused(copy, "manifest.json cannot be read as a manifest")
    (copy / "manifest.json").write_text("[]")
    refused(copy, "manifest.json cannot be read as a manifest")
