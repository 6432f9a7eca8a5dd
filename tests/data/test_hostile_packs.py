"""A pack that contradicts itself, or is far larger than it says: each reader names it in one sentence."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.describe import describe
from ltm_pyro.data.manifest import read_manifest
from ltm_pyro.data.shards import damage, read_lengths
from ltm_pyro.errors import UsageError

ROOM = 32 * 2**20  # bytes that refusing a hostile file may take


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A file of one array whose header says anything."""
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + content


def array(values, dtype) -> bytes:
    """A file of one array."""
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


def edit_tokens(change):
    """A change of the tokens of the first sample."""
    return lambda sample: sample.update({"tokens.npy": change(np.load(io.BytesIO(sample["tokens.npy"])))})


def edit_meta(**changes):
    """A change of what describes the first sample's rows: a value, or a function of the value before."""

    def change(sample):
        meta = json.loads(sample["meta.json"])
        for name, value in changes.items():
            meta[name] = value(meta[name]) if callable(value) else value
        sample["meta.json"] = json.dumps(meta).encode()

    return change


def first_is(value):
    """A change of a list: its first entry is ``value``."""
    return lambda values: [value, *values[1:]]


SAMPLES = {  # what is wrong -> how a sample is changed, and what the sentence says
    "tokens beyond the vocabulary": (
        edit_tokens(lambda x: array(np.where(np.arange(len(x)) == 3, 60000, x), np.uint16)),
        "the token 60000 is beyond the vocabulary",
    ),
    "tokens as floats": (edit_tokens(lambda x: array(x, np.float32)), "its numbers are float32"),
    "tokens with a sign": (edit_tokens(lambda x: array(x, np.int16)), "its numbers are int16"),
    "tokens as texts": (edit_tokens(lambda x: array(x, "U5")), "its numbers are <U5"),
    "tokens of eight bytes": (edit_tokens(lambda x: array(x, np.uint64)), "its numbers are uint64"),
    "a header of 14 TiB": (
        edit_tokens(lambda x: npy("{'descr': '<u2', 'fortran_order': False, 'shape': (7696581394432,), }")),
        "its header tells of 7696581394432 numbers, and 0 bytes follow",
    ),
    "a negative shape": (
        edit_tokens(lambda x: npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1, -4), }", b"\0" * 8)),
        "its header tells of 4 numbers",
    ),
    "a header that is none": (edit_tokens(lambda x: npy("(" * 900)), "its header cannot be read"),
    "a header of an unknown version": (edit_tokens(lambda x: npy("{}", b"", b"\x09\x00")), "version"),
    "an object in place of an array": (
        edit_tokens(lambda x: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8)),
        "its numbers are object",
    ),
    "a negative length": (edit_meta(lengths=first_is(-3)), "lengths has -3"),
    "a length of zero": (edit_meta(lengths=first_is(0)), "lengths has 0"),
    "a length that is a fraction": (edit_meta(lengths=first_is(3.5)), "lengths has 3.5"),
    "a length that is a text": (edit_meta(lengths=first_is("3")), "lengths has 3"),
    "a length of 23 digits": (edit_meta(lengths=first_is(10**22)), "lengths has 1000"),
    "negative bytes": (edit_meta(bytes=first_is(-1)), "bytes has -1"),
    "bytes that are NaN": (edit_meta(bytes=first_is(float("nan"))), "bytes has nan"),
    "a wrong first": (edit_meta(first=5), "its first row is 5, and the rows before it end at 0"),
    "a first that is true": (edit_meta(first=False), "first has False"),
    "a prompt longer than its row": (edit_meta(prompts=lambda values: [16] * len(values)), "longer than its row"),
    "a prompt of minus two": (edit_meta(prompts=first_is(-2)), "prompts has -2"),
    "no rows": (edit_meta(lengths=[], bytes=[], prompts=[], parts=[], documents={}), "different lengths, or none"),
    "a row of no document": (edit_meta(parts=first_is([])), "no document, or several"),
    "a part of an unknown document": (edit_meta(parts=first_is([[10**6, 0, 0]])), "KeyError: 1000000"),
    "a part that is no whole number": (edit_meta(parts=first_is([["0", 0, 0]])), "is no part of a document"),
    "a document that is none": (
        edit_meta(documents=lambda x: {key: [[1], 2, 3, 4] for key in x}),
        "no text or whole number as its id",
    ),
    "labels that are lists": (
        edit_meta(documents=lambda x: {key: ["a", "b", "c", {"label": [1]}] for key in x}),
        "'label' is [1], which is no label",
    ),
    "nesting without end": (lambda sample: sample.update({"meta.json": b"[" * 10**5}), "RecursionError"),
    "a member that is missing": (lambda sample: sample.pop("meta.json"), "KeyError: 'meta.json'"),
}


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def sign(folder, split="val", **changes):
    """Enters a shard as it is now into the manifest, which so vouches for it."""
    path = folder / f"{split}-000000.tar"
    raw = json.loads((folder / "manifest.json").read_text())
    with path.open("rb") as file:
        size = path.stat().st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if size < 2**28 else "0" * 64
    raw["splits"][split]["shards"][0] |= {"sha256": sha256, "size": size} | changes
    (folder / "manifest.json").write_text(json.dumps(raw))


def read(path):
    """The samples of a shard, in order."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            found.setdefault(key, {})[name] = tar.extractfile(member).read()
    return found


def write(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, content in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def refused(folder, words, split="val", file=None):
    """Every reader refuses the pack in one sentence with ``words``, and in bounded memory; verification names it."""
    tracemalloc.start()
    readers = {
        "dataset": lambda: list(PackedDataset.open(folder, split)),
        "describe": lambda: describe(folder, split, 1, 0),
        "verify": lambda: [sorted(x for _, name, x in damage(folder, read_manifest(folder)) if x and name == file)[0]],
    }
    for reader, use in readers.items():
        sentence = ""
        try:
            (sentence,) = use() if reader == "verify" else use() and [""]
        except UsageError as error:
            sentence = str(error)
        assert words in sentence, (reader, sentence)
        assert "\n" not in sentence
        assert len(sentence) < 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ROOM


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_that_cannot_be_right_is_named_by_every_reader(copy, kind):
    change, words = SAMPLES[kind]
    path = copy / "val-000000.tar"
    samples = read(path)
    change(next(iter(samples.values())))
    write(path, samples)
    sign(copy)
    refused(copy, words, file=path.name)


def test_rows_that_do_not_continue_the_rows_before_are_named(copy):
    path = copy / "train-000000.tar"
    samples = read(path)
    (key, whole) = next(iter(samples.items()))
    write(path, {key: whole, "again": whole})
    sign(copy, "train")
    refused(copy, "its first row is 0, and the rows before it end at", "train", path.name)


def test_a_shard_without_samples_is_named(copy):
    path = copy / "val-000000.tar"
    write(path, {})
    sign(copy)
    refused(copy, "its sequences is 0", file=path.name)


def test_bytes_of_text_that_do_not_add_up_are_named(copy):
    path = copy / "val-000000.tar"
    samples = read(path)
    edit_meta(bytes=lambda values: [values[0] + 1, *values[1:]])(next(iter(samples.values())))
    write(path, samples)
    sign(copy)
    refused(copy, "its bytes of text is", file=path.name)


def sparse_member(path):
    """A member of old GNU's sparse kind: 512 bytes in the file, 40 GB when it is read."""
    info = tarfile.TarInfo("000000000.tokens.npy")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = tarfile.itn(40 * 10**9, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + b"\0" * 512 + b"\0" * 1024 * 20)


def linked_member(path):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("000000000.tokens.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    path.write_bytes(path.read_bytes() + b"\0" * 2**16)


def huge_member(path):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("000000000.tokens.npy")
        info.size = 2**70
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    path.write_bytes(path.read_bytes() + b"\0" * 2**16)


@pytest.mark.parametrize("make", [sparse_member, linked_member, huge_member])
def test_a_member_that_is_no_plain_file_is_named(copy, make):
    path = copy / "val-000000.tar"
    make(path)
    sign(copy)
    refused(copy, "is no plain file of at most", file=path.name)


def test_a_compressed_shard_is_not_decompressed(copy):
    import gzip

    path = copy / "val-000000.tar"
    path.write_bytes(gzip.compress(b"\0" * 2**26))
    sign(copy)
    refused(copy, "has a sample that is not rows", file=path.name)


def test_a_shard_of_40_gb_without_content_is_not_read(copy):
    path = copy / "val-000000.tar"
    os.truncate(path, 40 * 10**9)
    refused(copy, "has 40,000,000,000 bytes, more than", file=path.name)
    sign(copy)
    with pytest.raises(UsageError, match="a shard has 40,000,000,000 bytes, and 4,294,967,296 are the most"):
        PackedDataset.open(copy)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_manifest_or_a_tokenizer_of_40_gb_is_not_read(copy, name):
    os.truncate(copy / name, 40 * 10**9)
    with pytest.raises(UsageError, match=f"{name} has 40,000,000,000 bytes, more than the 134,217,728"):
        PackedDataset.open(copy)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "val-000000.tar"])
def test_a_named_pipe_is_not_waited_for(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UsageError, match=r"is no file|no manifest\.json"):
        list(PackedDataset.open(copy, "val"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (array([5, 5], np.float64), "no list of lengths"),
        (array([[5], [5]], np.int64), "no list of lengths"),
        (npy("{'descr': '<u4', 'fortran_order': False, 'shape': (3848290697216,), }"), "its header tells of"),
        (b"no array", "no list of lengths"),
        (b"", "no list of lengths"),
    ],
)
def test_lengths_that_cannot_be_right_are_named(copy, content, words):
    (copy / "val-lengths.npy").write_bytes(content)
    raw = json.loads((copy / "manifest.json").read_text())
    raw["splits"]["val"]["lengths"] = hashlib.sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(raw))
    manifest = read_manifest(copy)
    with pytest.raises(UsageError, match=words):
        read_lengths(copy, "val", manifest.splits["val"], manifest.seq_len)
    assert "val-lengths.npy" in {file for _, file, problem in damage(copy, manifest) if problem}


def edit_shard(**changes):
    return lambda raw: raw["splits"]["val"]["shards"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit_shard(sha256="../../../etc/passwd"), "a SHA-256 is none"),
        (edit_shard(sha256=5), "cannot be read as a manifest"),
        (edit_shard(tokens=10**20), "counts are not its shards'"),
        (edit_shard(sequences=True), "no whole number above 0"),
        (edit_shard(bytes=-4), "no whole number"),
        (edit_shard(bytes=1.5), "cannot be read as a manifest"),
        (lambda raw: raw.update(seq_len=10**23), "more than a token's number"),
        (lambda raw: raw.update(dropped=-1), "no whole number"),
        (lambda raw: raw["splits"].update({"../x": raw["splits"]["val"]}), "there is a split '../x'"),
        (lambda raw: raw["splits"]["val"].update(documents="9"), "cannot be read as a manifest"),
        (lambda raw: raw["splits"]["val"].update(lengths="x"), "a SHA-256 is none"),
        (lambda raw: raw.update(rows="columns"), "columns"),
    ],
)
def test_a_manifest_whose_numbers_cannot_be_right_is_refused(copy, change, words):
    raw = json.loads((copy / "manifest.json").read_text())
    change(raw)
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=words):
        PackedDataset.open(copy)


def test_more_rows_than_a_shard_has_room_for_are_refused(copy):
    raw = json.loads((copy / "manifest.json").read_text())
    for part in (raw["splits"]["val"], raw["splits"]["val"]["shards"][0]):
        part |= {"sequences": 10**12, "tokens": 10**12}
    raw["splits"]["val"]["shards"] = raw["splits"]["val"]["shards"][:1]
    raw["splits"]["val"]["bytes"] = raw["splits"]["val"]["shards"][0]["bytes"]
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="1000000000000 tokens are not in 1000000000000 rows and"):
        PackedDataset.open(copy)


def test_rows_longer_than_their_stream_are_refused(copy):
    raw = json.loads((copy / "manifest.json").read_text())
    for split in raw["splits"].values():
        split["lengths"] = None
    (copy / "manifest.json").write_text(json.dumps(raw | {"rows": "stream", "seq_len": 10**9}))
    with pytest.raises(UsageError, match="no split fills a row of 1000000000 tokens"):
        PackedDataset.open(copy)


def test_a_manifest_nested_without_end_is_refused(copy):
    (copy / "manifest.json").write_text("[" * 10**5)
    with pytest.raises(UsageError, match="cannot be read as a manifest"):
        PackedDataset.open(copy)
