"""Labels are read from every kind of JSON lines; what netCDF cannot store is refused before any fit."""

import gzip
import json

import numpy as np
import pytest
import xarray as xr
import zstandard

from ltm_pyro.analysis.storage import read_tree, stamp, write_tree
from ltm_pyro.analysis.texts import Text, as_texts, read_texts
from ltm_pyro.errors import UsageError

RECORDS = [{"text": "one", "kind": "a", "year": 1}, {"text": " "}, {"text": "two", "more": []}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
LABELS = [{"kind": "a", "year": 1}, {}]
STORED = ["a.b", "Größe", " ", "..x", "_id", "token", "z", "documents"]
REFUSED = ["", ".", "..", "a/b", "a\\b", "a\0b", "\ud800", "document", "sequence"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["", ".gz", ".zst"])
def test_labels_come_along(tmp_path, pack):
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    file = tmp_path / f"b.jsonl{suffix}"
    file.write_bytes(pack(LINES))
    assert [text.labels for text in read_texts(file)] == LABELS
    (tmp_path / "a.jsonl.txt").write_bytes(LINES)
    found = read_texts(tmp_path)
    assert [text.labels for text in found] == [{}, *LABELS]
    assert [text.document for text in found] == ["a.jsonl.txt:1", f"{file.name}:1", f"{file.name}:3"]


@pytest.mark.parametrize("name", ["posterior.nc", "posterior.zarr"])
def test_labels_that_are_let_in_come_back(tmp_path, name):
    (text,) = as_texts([Text("a text", "x", dict.fromkeys(STORED, "é"))])
    data = xr.Dataset({label: ("sequence", np.array([x], dtype=object)) for label, x in text.labels.items()})
    tree = xr.DataTree.from_dict({"constant_data": data.assign_coords(sequence=[0])})
    tree.attrs = stamp("posterior")
    write_tree(tree, tmp_path / name)
    assert {*read_tree(tmp_path / name, "posterior")["constant_data"].data_vars} == {*STORED}


@pytest.mark.parametrize("label", REFUSED)
def test_labels_that_no_posterior_can_store(label):
    with pytest.raises(UsageError) as refused:
        as_texts([Text("a text", "x.jsonl:3", {"kind": "a", label: "b"})])
    assert f"Text x.jsonl:3 has the label {label!r}" in str(refused.value)


@pytest.mark.parametrize(
    "text", [Text("a\0b", "x:0"), Text("a", "x:0", {"text ": "\0"}), Text("a", "x:0", {"y": "\udfff"})]
)
def test_characters_that_no_posterior_can_store(text):
    with pytest.raises(UsageError, match="Text x:0 has a NUL or half of a surrogate pair under"):
        as_texts([text])
