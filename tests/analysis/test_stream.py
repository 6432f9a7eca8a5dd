"""Stores that are written block by block: equal to a posterior at once, continued after a kill, by many processes."""

import random

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from ltm_pyro.analysis import DrawOptions, Posterior, Text, draw_posterior, stream
from ltm_pyro.analysis.stream import Place, blocks_of, stream_posterior
from ltm_pyro.errors import UsageError

WORDS = ["the", "old", "model", "reads", "a", "long", "text", "and", "writes", "short", "words", "about", "time"]
OPTIONS = DrawOptions(samples=25, replicas=1)


def texts(count):
    draw = random.Random(0)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(count)]
    return [Text(x, f"d{n}", {"year": n if n % 5 else None, "kind": draw.choice("ab")}) for n, x in enumerate(made)]


@pytest.fixture
def run(tiny_run, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 16)
    return tiny_run(layers=1, thoughts=1, thought_width=2)


def differences(found, expected):
    """The variables in which two posteriors differ by more than rounding."""
    names = []
    for group in expected.tree.groups:
        ours, theirs = (x.tree[group].to_dataset() for x in (found, expected))
        for name, x in theirs.variables.items():
            if x.dtype.kind in "iuf":
                same = np.allclose(ours[name], x, atol=1e-6, equal_nan=True)
            else:
                same = (np.asarray(ours[name].values, object) == np.asarray(x.values, object)).all()
            if not same:
                names.append(f"{group}/{name}")
    return names


def test_a_store_is_the_posterior(run, tmp_path):
    assert stream_posterior(run, texts(40), tmp_path / "a.zarr", OPTIONS, longer="cut")
    found, expected = Posterior.load(tmp_path / "a.zarr"), draw_posterior(run, texts(40), OPTIONS, longer="cut")
    assert differences(found, expected) == []
    assert found.labels == expected.labels
    assert found.labels["year"][:3] == [None, 1, 2]
    assert [x.size for x in blocks_of(tmp_path / "a.zarr")] == [16, 16, 8]


def test_interrupted_twice_and_continued_by_two(run, tmp_path, monkeypatch):
    path, plain = tmp_path / "b.zarr", stream.draw_sequences
    done = []

    def interrupted(*arguments):
        done.append(1)
        if len(done) in (3, 5):
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(stream, "draw_sequences", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stream_posterior(run, texts(70), path, OPTIONS, longer="cut", place=Place(0, 2))
        with pytest.raises(UsageError, match=r"of 5 blocks: repeat the command"):
            Posterior.load(path)
    assert not stream_posterior(run, texts(70), path, OPTIONS, longer="cut", place=Place(1, 2))
    assert stream_posterior(run, texts(70), path, OPTIONS, longer="cut", place=Place(0, 2))
    calls = len(done)
    assert stream_posterior(run, texts(70), path, OPTIONS, longer="cut")
    assert len(done) == calls, "a complete store needs no further work"
    assert differences(Posterior.load(path), draw_posterior(run, texts(70), OPTIONS, longer="cut")) == []


def test_draws_are_optional(run, tmp_path):
    stream_posterior(run, texts(20), tmp_path / "c.zarr", OPTIONS, longer="cut", keep=0)
    found, whole = Posterior.load(tmp_path / "c.zarr"), draw_posterior(run, texts(20), OPTIONS, longer="cut")
    assert not found.has("posterior")
    np.testing.assert_allclose(found.stats["pareto_k"], whole.stats["pareto_k"])
    np.testing.assert_allclose(found.stats["mean"], whole.stats["mean"])
    assert found.select([3]).stats["elbo"].size == 1
    with pytest.raises(UsageError, match="without the group posterior"):
        found.draws  # noqa: B018
    stream_posterior(run, texts(20), tmp_path / "d.zarr", OPTIONS, longer="cut", keep=3)
    few = Posterior.load(tmp_path / "d.zarr")
    np.testing.assert_allclose(few.z, whole.z[:, :3])
    assert few.group("sample_stats").sizes["draw"] == 3


def test_dask_reads_it_in_blocks(run, tmp_path):
    dask = pytest.importorskip("dask")
    path = tmp_path / "e.zarr"
    stream_posterior(run, texts(40), path, OPTIONS, longer="cut")
    with (
        xr.open_datatree(path, engine="zarr", chunks={}, consolidated=False) as stored,
        dask.config.set(scheduler="sync"),
    ):
        z = stored["posterior"]["z"]
        assert z.chunksizes["sequence"] == (16, 16, 8)
        numbers = zarr.open_array(path / "posterior" / "sequence", mode="r")
        assert numbers.chunks == (40,)  # and not a file for each
        lazily = z.mean(("chain", "draw")).std("sequence").compute()
    np.testing.assert_allclose(lazily, Posterior.load(path).z.mean(("chain", "draw")).std("sequence"), atol=1e-6)


def test_a_store_of_something_else_is_refused(run, tiny_run, tmp_path):
    path = tmp_path / "f.zarr"
    stream_posterior(run, texts(20), path, OPTIONS, longer="cut")
    other = tiny_run(layers=1, thoughts=1, thought_width=2)
    with torch.no_grad():
        other.model.decoder.embedding.weight.add_(0.01)
    for again in (
        {"run": other, "texts": texts(20)},
        {"run": run, "texts": texts(21)},
        {"run": run, "texts": texts(20), "seed": 1},
        {"run": run, "texts": texts(20), "options": DrawOptions(samples=26)},
    ):
        with pytest.raises(UsageError, match="not a store of these texts"):
            stream_posterior(path=path, longer="cut", **{"options": OPTIONS} | again)
    (tmp_path / "g.zarr").mkdir()
    with pytest.raises(UsageError, match="not a store of these texts"):
        stream_posterior(run, texts(20), tmp_path / "g.zarr", OPTIONS, longer="cut")
    with pytest.raises(UsageError, match="30 draws cannot be kept of 25"):
        stream_posterior(run, texts(20), path, OPTIONS, longer="cut", keep=30)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, None),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, None),
    ],
)
def test_its_place_among_processes(environment, place):
    if place is None:
        with pytest.raises(UsageError, match="without gaps"):
            Place.of_environment(environment)
    else:
        assert Place.of_environment(environment) == place


def test_time_left_is_said(capsys, monkeypatch):
    now = iter(range(0, 1000, 40))
    monkeypatch.setattr(stream.time, "monotonic", lambda: next(now))
    assert list(stream._with_progress([4, 5, 6], Place(1, 2))) == [4, 5, 6]
    assert "1 of 3 blocks of process 1 are done, about" in capsys.readouterr().err
