"""`ltm posterior --stream` killed twice and continued by two processes, and what it writes beside the store."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import zarr

from ltm_pyro.analysis import Posterior
from ltm_pyro.analysis.stream import BLOCK

TEXTS = [
    {"text": f"text {n} of the small model", "key": f"k{n}", "year": 1900 + n, "source": "ab"[n % 2]}
    for n in range(2 * BLOCK + 30)
]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


def command(run, texts, out, *options):
    fixed = ("--samples", "25", "--longer", "cut", "--keep-draws", "0", "--fast-steps", "1", "--stream", "--id", "key")
    return [
        sys.executable,
        "-P",
        "-m",
        "ltm_pyro.cli",
        "posterior",
        run,
        "--input",
        texts,
        "--out",
        out,
        *fixed,
        *options,
    ]


def written(store):
    place = store / "ltm_pyro" / "complete"
    return zarr.open_array(place, mode="r")[:].sum() if place.exists() else 0


def test_a_store_is_replaced_only_once_the_new_one_can_begin(run, ltm, refused, tmp_path):
    (tmp_path / "texts.txt").write_text("the old day")
    words = ("posterior", run, "--input", tmp_path / "texts.txt", "--out", tmp_path / "q.zarr", "--stream")
    options = ("--samples", 25, "--fast-steps", 1, "--force")
    assert ltm(*words, *options[:-1])[0] == 0
    assert "26 draws cannot be kept of 25" in refused(*words, *options, "--keep-draws", 26)
    assert Posterior.load(tmp_path / "q.zarr").size == 1
    (tmp_path / "texts.txt").write_text("the old day\n\n\n" + "too long " * 100)
    assert "choose to `cut`" in refused(*words, *options)
    assert Posterior.load(tmp_path / "q.zarr").size == 1
    assert ltm(*words, *options, "--longer", "cut")[0] == 0
    assert Posterior.load(tmp_path / "q.zarr").size == 2


@pytest.mark.slow
def test_killed_twice_and_continued_by_two_processes(run, texts, tmp_path):
    store, alone = tmp_path / "shared.zarr", tmp_path / "alone.zarr"
    subprocess.run(command(run, texts, alone), check=True, capture_output=True)
    of_two = [os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    for wanted in (1, 2):  # each time killed once another block is there
        process = subprocess.Popen(command(run, texts, store), env=of_two[0], stderr=subprocess.PIPE)
        while written(store) < wanted and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    both = [
        subprocess.Popen(command(run, texts, store), env=x, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for x in of_two
    ]
    said = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    found, expected = Posterior.load(store), Posterior.load(alone)
    assert found.labels == expected.labels
    assert found.texts == expected.texts
    for name in expected.stats:
        np.testing.assert_allclose(found.stats[name], expected.stats[name], atol=1e-5)


def test_a_table_of_embeddings_and_the_nearest_texts(run, texts, ltm, refused, tmp_path):
    store, table = tmp_path / "store.zarr", tmp_path / "table.parquet"
    few = ("--limit", 20, "--longer", "cut", "--samples", 25, "--id", "key")
    options = ("posterior", run, "--input", texts, "--out", store, *few, "--stream", "--embeddings", table, "--json")
    code, printed, err = ltm(*options)
    assert code == 0, err
    figures, found = json.loads(printed), Posterior.load(store)
    rows = pyarrow.parquet.read_table(table)
    assert figures["sequences"] == found.size == rows.num_rows == 20
    assert figures["mean_elbo"] == pytest.approx(float(found.stats["elbo"].mean()))
    assert rows["id"].to_pylist() == [f"k{n}" for n in range(20)]
    assert rows["year"].to_pylist() == [*range(1900, 1920)]
    np.testing.assert_allclose(rows["mean"].to_pylist(), found.stats["mean"].values.reshape(20, -1), rtol=1e-6)
    assert rows.schema.metadata[b"thoughts"] == b"2,2,16"
    plain = ("posterior", run, "--input", texts, "--out", tmp_path / "new.nc", *few, "--nearest", store)
    code, printed, err = ltm(*plain, "--json")
    assert code == 0, err
    near = json.loads(printed)["nearest"]
    assert len(near) == 20
    assert {x["sequence"] for x in near[3]} & {n for n in range(20) if TEXTS[n]["text"] == TEXTS[3]["text"]}
    assert sum(x["probability"] for x in near[3]) <= 1
    code, printed, err = ltm(*plain, "--force")
    assert "Nearest texts" in printed
    assert "does not end in .zarr" in refused(
        "posterior", run, "--input", texts, "--out", tmp_path / "x.nc", "--stream"
    )
    assert "belongs to --stream" in refused(
        "posterior", run, "--input", texts, "--out", tmp_path / "x.nc", "--keep-draws", 1
    )
    assert "no string or whole number under 'none'" in refused(
        "posterior", run, "--input", texts, "--out", tmp_path / "x.nc", "--id", "none"
    )
    assert "not a store" in refused(*options[:-2], tmp_path / "other.parquet", "--seed", 1)


def test_evidence(run, texts, ltm, refused, tmp_path):
    few = ("--limit", 12, "--longer", "cut", "--samples", 25)
    for name, seed in (("a", 0), ("b", 1)):
        options = ("--out", tmp_path / f"{name}.nc", *few, "--seed", seed, "--temperatures", 2)
        assert ltm("posterior", run, "--input", texts, *options)[0] == 0
    code, printed, err = ltm(
        "evidence", tmp_path / "a.nc", tmp_path / "b.nc", "--picture", tmp_path / "p.png", "--json"
    )
    assert code == 0, err
    found = json.loads(printed)
    assert found["estimator"] == "ais"
    assert found["winner"] is None
    assert {x["name"] for x in found["candidates"]} == {"a", "b"}
    assert (tmp_path / "p.png").stat().st_size > 5000
    code, printed, _ = ltm("evidence", tmp_path / "a.nc", tmp_path / "b.nc", "--estimator", "iwae")
    assert "No winner" in printed
    assert "at least two posteriors" in refused("evidence", tmp_path / "a.nc")
    assert "--force" in refused("evidence", tmp_path / "a.nc", tmp_path / "b.nc", "--picture", tmp_path / "p.png")


def test_no_label_takes_the_column_of_another(run, ltm, tmp_path):
    file, table = tmp_path / "texts.jsonl", tmp_path / "table.parquet"
    rows = [{"text": f"the old model {n}", "mean": n, "label_mean": f"name {n}"} for n in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    few = ("--longer", "cut", "--samples", 25, "--out", tmp_path / "p.nc", "--embeddings", table)
    code, _, err = ltm("posterior", run, "--input", file, *few)
    assert code == 0, err
    columns = pyarrow.parquet.read_table(table)
    assert columns["label_mean"].to_pylist() == ["name 0", "name 1"]
    assert columns["label_label_mean"].to_pylist() == [0, 1]


def test_a_store_without_draws_makes_no_report(run, texts, ltm, refused, tmp_path):
    store = tmp_path / "store.zarr"
    few = ("--limit", 2, "--longer", "cut", "--samples", 25, "--stream", "--keep-draws", 0)
    code, _, err = ltm("posterior", run, "--input", texts, "--out", store, *few)
    assert code == 0, err
    assert "ltm report" not in err
    assert "prior" not in Posterior.load(store).tree.children
    assert "has no draws" in refused("report", store, "--out", tmp_path / "r.html")
