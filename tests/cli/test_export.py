"""`ltm export`: the exported run gives identical bounds; incomplete and unsafe folders are refused."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ltm_pyro.runs import export
from ltm_pyro.runs.load import load_run


@pytest.fixture
def exported(run, ltm, tmp_path):
    code, out, _ = ltm("export", run, "--out", tmp_path / "shared", "--json")
    assert code == 0
    assert set(json.loads(out)["files"]) == {"README.md", "config.yaml", "model.safetensors", "tokenizer.json"}
    return tmp_path / "shared"


def test_bounds_are_identical(run, ltm, exported):
    options = ("--limit", 4, "--samples", 2, "--json")
    assert ltm("evaluate", exported, *options)[1] == ltm("evaluate", run, *options)[1]
    assert ltm("generate", exported, "--json")[1] == ltm("generate", run, "--json")[1]


def test_suites_take_it(exported, ltm, tmp_path):
    options = ("--suite", "reconstruction", "--limit", 2, "--fast-steps", 1, "--out", tmp_path / "out", "--json")
    code, out, err = ltm("evaluate", exported, *options)
    assert code == 0, err
    weights = (exported / "model.safetensors").read_bytes()
    assert json.loads(out)["settings"]["sha256"] == {"model": hashlib.sha256(weights).hexdigest()}


def test_a_weight_under_two_names_is_written_under_both(run, tmp_path, monkeypatch):
    read = export.read_checkpoint

    def tied(path):
        checkpoint = read(path)
        weights = checkpoint["state_dict"]
        first, second = (f"model.decoder.blocks.{n}.norm_forward.weight" for n in (0, 1))
        weights[second] = weights[first].view(-1)
        return checkpoint

    monkeypatch.setattr(export, "read_checkpoint", tied)
    export.save_pretrained(run, tmp_path / "shared")
    blocks = load_run(tmp_path / "shared").model.decoder.blocks
    assert blocks[0].norm_forward.weight.equal(blocks[1].norm_forward.weight)
    with pytest.raises(RuntimeError, match="share memory"):  # what it would be otherwise
        save_file(tied(run)["state_dict"], tmp_path / "tied")


def test_the_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ltm_pyro\n")
    assert "`ltm_pyro.models.gaussian.GaussianPrior`, `ltm_pyro.guides.mean_field.MeanField`" in card
    parameters = sum(p.numel() for p in load_run(exported).model.parameters())
    assert f"| parameters | {parameters:,} |" in card


@pytest.mark.parametrize(("change", "word"), [("missing", "absent"), ("extra", "absent"), ("shape", "(3,)")])
def test_other_weights_are_refused(exported, refused, change, word):
    weights = load_file(exported / "model.safetensors")
    name = sorted(weights)[0]
    if change == "missing":
        del weights[name]
    weights |= {"extra": {"other": weights.get(name)}, "shape": {name: weights[sorted(weights)[0]].new_zeros(3)}}.get(
        change, {}
    )
    save_file({n: w.clone() for n, w in weights.items()}, exported / "model.safetensors")
    message = refused("evaluate", exported)
    assert word in message
    assert "another architecture" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "state.pkl", "last.ckpt", "x.pt"])
def test_a_pickle_in_the_folder_is_refused(exported, refused, name):
    (exported / name).write_bytes(pickle.dumps(print))
    assert name in refused("generate", exported)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_a_missing_file_is_named(exported, refused, name):
    (exported / name).unlink()
    assert name in refused("generate", exported)


def test_weights_that_are_no_safetensors(exported, refused):
    (exported / "model.safetensors").write_bytes(b"not a model")
    assert "cannot be read" in refused("generate", exported)


def test_an_unknown_prior_is_refused(exported, refused):
    recipe = (exported / "config.yaml").read_text()
    (exported / "config.yaml").write_text(recipe.replace("ltm_pyro.models.GaussianPrior", "nowhere.Prior"))
    assert "nowhere" in refused("generate", exported)


def test_an_existing_folder_is_not_replaced(run, ltm, exported, refused):
    (exported / "notes.txt").write_text("mine")
    assert "--force" in refused("export", run, "--out", exported)
    assert ltm("export", run, "--out", exported, "--force")[0] == 0
    assert (exported / "notes.txt").read_text() == "mine"
    shutil.rmtree(exported)


def test_an_export_that_fails_changes_nothing(run, exported, refused, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    original = Path.write_bytes

    def full(path, content):
        if path.name.startswith("model"):
            raise OSError(28, "No space left on device")
        return original(path, b"new" + content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused("export", run, "--out", exported, "--force")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_a_folder_that_is_no_export_is_left_alone(run, refused, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert "no model.safetensors" in refused("export", run, "--out", tmp_path, "--force")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
