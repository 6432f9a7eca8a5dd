"""Several processes train as one: the same decoder, one log, and no waiting for each other for ever."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ltm_pyro.data import pack, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.load import load_run
from ltm_pyro.training.recipe import build, read_recipe

SCRIPT = Path(__file__).parent / "ranks.py"
RECIPE = {
    "model": {
        "vocabulary": 280,
        "decoder": {
            "class_path": "ltm_pyro.models.Decoder",
            "init_args": {"layers": 1, "width": 16, "heads": 2, "thoughts": 2, "window": 4, "length": 16},
        },
        "inference": {"steps": 2},
        "evaluation": {"steps": 2},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 12, "val_check_interval": 5, "log_every_n_steps": 1},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    text = "\n\n\n".join(f"the {i} small words of a long day are {i * 7} old" for i in range(60))
    (folder / "words.txt").write_text(text)
    pack([folder / "words.txt"], folder / "pack", tokenizer="bpe:280", seq_len=16, val_fraction=0.1, shard_rows=30)
    return folder / "pack"


@pytest.fixture
def recipe(packed, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": {"directory": str(packed), "batch_size": 8}}))
    return path


def call(*command):
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("poisoned", [[], range(40)], ids=["sound", "one step without a finite ELBO"])
def test_two_ranks_give_the_decoder_of_one_with_twice_the_batch(packed, tmp_path, poisoned):
    assert read_manifest(packed).splits["train"].sequences % 12  # the last step is a short one
    for ranks, batch_size in ((1, 12), (2, 6)):
        call(SCRIPT, packed, tmp_path / f"{ranks}.pt", ranks, batch_size, *poisoned)
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_the_command_line_on_two_ranks_logs_once_and_goes_on(recipe, tmp_path):
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.workers", 1, "--ckpt_path", "last")
    fit = ("-P", "-m", "ltm_pyro.cli", "fit", "--config", recipe, "--run", tmp_path / "run", *ranks)
    said = call(*fit)
    assert said.count("tokens per step") == 1
    assert "on 2 ranks" in said
    assert said.count("training 100%") == 1
    call(*fit, "--trainer.max_steps", 16)
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(16))
    assert [int(row["step"]) for row in rows if row["val/bound"]] == [4, 9, 14]
    assert all(x.isfinite().all() for x in load_run(tmp_path / "run").model.state_dict().values())


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_sharded_strategies_are_refused(recipe, tmp_path, strategy):
    config = read_recipe(["--config", str(recipe), "--run", str(tmp_path / "run"), "--trainer.strategy", strategy])
    with pytest.raises(UsageError, match=rf"`trainer.strategy` is {strategy}, but fast steps .*: choose ddp"):
        build(config)
