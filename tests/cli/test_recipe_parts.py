"""What Lightning brings is named in a recipe: averaged weights, early stopping on the honest bound, other loggers."""

import csv
import subprocess
import sys

import pytest
import torch
import yaml

from ltm_pyro.runs.load import load_run

CALLBACKS = "pytorch_lightning.callbacks"


@pytest.fixture
def extended(recipe, tmp_path):
    """Adds trainer settings to the recipe; returns it and the run directory."""

    def add(**trainer):
        content = yaml.safe_load(recipe.read_text())
        content["trainer"] |= trainer
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path, tmp_path / "run"

    return add


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("first", ["sys", "rich.console"])  # which decide how Python sorts Optional[Union[int, float]]
def test_a_whole_number_stays_one_whatever_was_imported_first(extended, first):
    recipe, _ = extended(limit_val_batches=1, limit_train_batches=1.0, val_check_interval=2, gradient_clip_val=0.5)
    words = ["--config", str(recipe), "--trainer.limit_test_batches=1"]
    program = f"import {first}; from ltm_pyro.training.recipe import read_recipe; print(read_recipe({words}).trainer)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for setting in (
        *("limit_val_batches=1,", "limit_test_batches=1,", "limit_train_batches=1.0,"),  # one batch, and all of them
        *("val_check_interval=2,", "gradient_clip_val=0.5,"),
    ):
        assert setting in printed


def test_averaged_weights_are_what_is_scored_and_training_goes_on_from_the_others(extended, ltm):
    average = {"class_path": f"{CALLBACKS}.EMAWeightAveraging", "init_args": {"decay": 0.5, "use_buffers": False}}
    recipe, run = extended(callbacks=[average], max_steps=6)
    keep = ("--checkpoints.every", 4, "--checkpoints.keep", 2)
    code, _, err = ltm("fit", "--config", recipe, "--run", run, *keep)
    assert code == 0, err
    whole, final = metrics(run), load_run(run).model.state_dict()
    older = run / "checkpoints" / "step-000000004.ckpt"
    saved = torch.load(older, weights_only=True)
    name = next(name for name in saved["state_dict"] if name.endswith("embedding.weight"))
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    assert ltm("fit", "--config", run / "config.yaml", "--ckpt_path", older)[0] == 0
    assert [row["train/loss"] for row in metrics(run)] == [row["train/loss"] for row in whole]
    assert all(torch.equal(final[name], x) for name, x in load_run(run).model.state_dict().items())


def test_training_stops_when_the_honest_bound_no_longer_falls(extended, ltm):
    stopping = {"monitor": "val/bound", "min_delta": 9.0, "patience": 2}
    recipe, run = extended(
        callbacks=[{"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": stopping}], max_steps=50
    )
    code, _, err = ltm("fit", "--config", recipe, "--run", run)
    assert code == 0, err
    assert len([row for row in metrics(run) if row["val/bound"]]) == 3
    assert len([row for row in metrics(run) if row["train/loss"]]) == 6


def test_other_loggers_stand_beside_the_csv_file(extended, ltm, tmp_path):
    board = {
        "class_path": "pytorch_lightning.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path / "b")},
    }
    recipe, run = extended(logger=board)
    code, _, err = ltm("fit", "--config", recipe, "--run", run)
    assert code == 0, err
    assert len(metrics(run)) == 4
    assert float(metrics(run)[0]["train/flops_per_second"]) > 0
    assert list((tmp_path / "b").rglob("events.out.*"))
