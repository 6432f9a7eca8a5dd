"""`ltm posterior` and `ltm calibrate`: files that can be read again, and errors of one sentence."""

import json
import shutil

import pytest
import torch

from ltm_pyro.analysis import Posterior, draw_posterior
from ltm_pyro.analysis.calibration import Calibration
from ltm_pyro.analysis.posterior import TEXT
from ltm_pyro.runs.load import load_run

TEXTS = [
    {"text": "the small model reads long words", "source": "a", "year": 1999, "more": {"x": 1}},
    {"text": " \n"},
    {"text": "every language writes a text about old people and time of day", "source": "b"},
]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def thoughtless(recipe, ltm, tmp_path):
    """A run with K = 0."""
    options = ("--model.decoder.init_args.thoughts", 0, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "thoughtless", *options)[0] == 0
    return tmp_path / "thoughtless"


def test_a_posterior_with_labels_and_replicas(run, texts, ltm, tmp_path):
    out = tmp_path / "posterior.nc"
    options = ("--longer", "split", "--samples", 30, "--replicas", 2, "--json")
    code, printed, err = ltm("posterior", run, "--input", texts, "--out", out, *options)
    assert code == 0, err
    found, figures = Posterior.load(out), json.loads(printed)
    assert figures["sequences"] == found.size > 2
    assert found.labels["source"][0] == "a"
    assert [*zip(found.labels["source"], found.labels["year"], strict=True)][:: found.size - 1] == [
        ("a", 1999),
        ("b", None),
    ]
    assert set(found.labels) == {"document", "source", "year"}
    assert len(set(found.labels["document"])) == 2
    assert "".join(found.texts[1:]).endswith("time of day")
    assert found.group(TEXT)["replica_tokens"].shape == (2, found.size, 16)
    assert figures["mean_elbo"] <= figures["mean_iwae"] < 0
    assert found.attrs["run"] == draw_posterior(load_run(run), ["day"]).attrs["run"] == str(run.resolve())
    assert ltm("posterior", run, "--input", texts, "--out", out, *options, "--force")[1] == printed


def test_a_folder_is_not_replaced(run, texts, ltm, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    code, _, err = ltm("posterior", run, "--input", texts, "--out", folder, "--force")
    assert (code, folder.is_dir()) == (2, True)
    assert "folder is a folder, which --force does not replace" in " ".join(err.split())


@pytest.mark.parametrize("method", ["langevin", pytest.param("nuts", marks=pytest.mark.slow)])
def test_a_reference(run, texts, ltm, tmp_path, method):
    out = tmp_path / "chains.nc"
    options = ("--longer", "cut", "--limit", 1, "--samples", 30, "--warmup", 10, "--method", method, "--json")
    code, printed, err = ltm("posterior", run, "--input", texts, "--out", out, *options)
    assert code == 0, err
    assert {"max_r_hat", "min_ess"} <= json.loads(printed).keys()
    assert Posterior.load(out).z.sizes["chain"] == 2


def test_calibrate_writes_ranks_and_a_picture(run, ltm, refused, tmp_path):
    ranks, picture = tmp_path / "ranks.nc", tmp_path / "ranks.png"
    options = ("--simulations", 20, "--samples", 9, "--out", ranks, "--picture", picture)
    code, printed, err = ltm("calibrate", run, *options, "--json")
    assert code == 0, err
    figures = json.loads(printed)
    assert 0 < figures["p_value"] <= 1
    assert Calibration.load(ranks).p_value() == figures["p_value"]
    assert picture.stat().st_size > 10_000
    assert "--force" in refused("calibrate", run, *options)
    assert "what it should be" in ltm("calibrate", run, *options, "--force")[1]


def test_what_cannot_be_inferred(run, thoughtless, texts, refused, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    out = ("--out", tmp_path / "out.nc")
    assert "length is 16" in refused("posterior", run, "--input", texts, *out)
    assert "blank.txt" in refused("posterior", run, "--input", tmp_path / "blank.txt", *out)
    assert "K = 0" in refused("posterior", thoughtless, "--input", texts, *out, "--longer", "cut")
    assert "K = 0" in refused("calibrate", thoughtless)
    assert "25 samples, got 5" in refused("posterior", run, "--input", texts, *out, "--samples", 5)
    assert "'hmc'" in refused("posterior", run, "--input", texts, *out, "--method", "hmc")
    assert "200 replicas" in refused("posterior", run, "--input", texts, *out, "--replicas", 200)
    assert "no folder" in refused("posterior", run, "--input", texts, "--out", tmp_path / "no" / "out.nc")
    assert "20 simulations, got 3" in refused("calibrate", run, "--simulations", 3)
    assert "multiple of 10" in refused("calibrate", run, "--samples", 8)
    assert "no device 'cuda:99'" in refused("calibrate", run, "--device", "cuda:99")
    assert "no device 'cuda:99'" in refused("posterior", run, "--input", texts, *out, "--device", "cuda:99")
    for force in ((), ("--force",)):
        assert "is another file of this command" in refused("posterior", run, "--input", texts, "--out", texts, *force)
    (texts.parent / "there.nc").touch()
    assert "--force" in refused("posterior", run, "--input", texts, "--out", texts.parent / "there.nc")
    both = ("--out", texts.parent / "new.nc", "--embeddings", texts.parent / "new.nc")
    assert "choose another --embeddings" in refused("posterior", run, "--input", texts, *both)
    assert not (tmp_path / "out.nc").exists()


def test_a_broken_checkpoint(run, texts, refused, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    checkpoint = torch.load(broken / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.decoder.embedding.weight"][:] = torch.nan
    torch.save(checkpoint, broken / "checkpoints" / "last.ckpt")
    message = refused("posterior", broken, "--input", texts, "--out", tmp_path / "out.nc", "--longer", "cut")
    assert "not finite" in message


def test_a_calibration_is_not_replaced_by_its_picture(run, refused, tmp_path):
    sentence = refused("calibrate", run, "--out", tmp_path / "x.png", "--picture", tmp_path / "x.png")
    assert "another file of this command" in sentence
