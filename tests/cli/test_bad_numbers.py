"""Numbers that no setting can have, and names that would be paths: one sentence before anything is made."""

import math
import os

import numpy as np
import pytest
import torch

from ltm_pyro.cli.arguments import LARGEST, at_least
from ltm_pyro.cli.main import COMMANDS
from ltm_pyro.contracts import Init
from ltm_pyro.data.pack import pack
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.state import LocalInference, Stop
from ltm_pyro.models import Decoder
from ltm_pyro.studies.search.storage import open_storage
from ltm_pyro.studies.search.study import check_name
from ltm_pyro.text.sampling import Sampling
from ltm_pyro.training.datamodule import PackedData
from ltm_pyro.training.schedules import Curriculum
from ltm_pyro.utils.files import atomic_write, check_file
from ltm_pyro.utils.limits import LARGEST_SEED


@pytest.mark.parametrize("text", ["٣", "1e3", "", " 1", "1_000", "--1", "10" * 11, "9" * 5000, str(LARGEST + 1)])
def test_counts_are_whole_numbers_in_ascii_and_have_an_end(text):
    with pytest.raises(Exception, match=r"is not a whole number|is more than 2147483647") as caught:
        at_least(0)(text)
    assert len(str(caught.value)) < 200
    assert at_least(0)(str(LARGEST)) == LARGEST
    assert at_least(0, LARGEST_SEED)(str(LARGEST_SEED)) == LARGEST_SEED


def test_every_command_takes_the_seeds_that_numpy_takes(ltm, refused, recipe, tmp_path):
    np.random.RandomState(LARGEST_SEED)
    with pytest.raises(ValueError, match="between 0 and 2"):
        np.random.RandomState(LARGEST_SEED + 1)
    seeded = [name.split() for name in COMMANDS if "--seed N" in ltm(*name.split(), "--help")[1]]
    assert len(seeded) == 10
    for command in seeded:
        command += ["copy"] if command == ["data", "make"] else []  # whose options are those of a task
        assert "'4294967296' is more than 4294967295" in refused(*command, "--seed", LARGEST_SEED + 1)
        assert "more than" not in refused(*command, "--seed", LARGEST_SEED, "--no-such-option")
    fit = ("fit", "--config", recipe, "--run", tmp_path / "run", "--seed_everything")
    assert "`seed_everything` is 4294967296: choose a seed from 0 to 4294967295" in refused(*fit, LARGEST_SEED + 1)
    study = ("study", "run", "rate_ratio", "--base-config", recipe, "--storage", f"sqlite:///{tmp_path}/x.db")
    options = ("--budget", "2e9flops", "--trials", 4, "--repeats", 2, "--out", tmp_path / "out")
    assert "choose one of at most 4294967289" in refused(*study, *options, "--seed", LARGEST_SEED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        *(lambda x=x: LocalInference(rate=x) for x in (-0.1, math.inf, math.nan)),
        *(lambda x=x: LocalInference(kl_weight=x) for x in (-1.0, math.inf, math.nan)),
        lambda: LocalInference(steps=10**20),
        lambda: LocalInference(particles=10**20),
        *(lambda x=x: Stop(tolerance=x) for x in (math.inf, math.nan)),
        *(lambda x=x: Init(log_var=x) for x in (math.inf, math.nan, 1e9)),
        *(lambda x=x: Init(jitter=x) for x in (-1.0, math.inf, math.nan)),
        *(lambda x=x: Sampling(temperature=x) for x in (math.inf, math.nan, 0.0)),
        *(lambda x=x: Sampling(repetition_penalty=x) for x in (math.inf, math.nan, -1.0)),
        lambda: Curriculum(steps=[(0.5, 4), (0.2, 8)]),
        lambda: Curriculum(steps=[]),
        lambda: Curriculum(steps=[(0, 10**20)]),
        lambda: Curriculum(steps=[(0, -1)]),
        lambda: Curriculum(rate=[(0, 0.3), (1, -0.3)]),
        lambda: Curriculum(particles=[(0, 0.2)]),
        lambda: Curriculum(kl_weight=[(0, -1)]),
        lambda: Curriculum(flops_per_token=[(0, -1)]),
        lambda: PackedData("x", workers=5000),
        lambda: PackedData("x", batch_size=10**20),
        lambda: Decoder(11, thoughts=-1, width=8, heads=2),
        lambda: Decoder(11, thought_width=-1, width=8, heads=2),
        lambda: Decoder(11, width=3_000_000, heads=2),
        lambda: Decoder(11, width=8, heads=2, length=10**20),
        lambda: Decoder(10**20, width=8, heads=2),
        lambda: pack(["x"], "y", seq_len=10**22),
    ],
)
def test_what_no_setting_can_be_is_refused(make):
    with pytest.raises(UsageError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_large_decoder_can_still_be_described():
    with torch.device("meta"):
        assert Decoder(50_000, layers=1, width=65_536, heads=64, length=64).width == 65_536


@pytest.mark.parametrize("name", ["../ESC", "/etc/x", "a/b", "a\\b", ".hidden", "", "a\nb", "a\0", "x" * 101])
def test_a_studys_name_is_no_path(name, refused, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="names no study's files"):
        check_name(name)
    if "\0" not in name and name:
        monkeypatch.chdir(tmp_path)
        assert "names no study's files" in refused("study", "run", "rate_ratio", f"--study-name={name}")
        assert not list(tmp_path.iterdir())


def test_ordinary_names_of_studies_stay():
    for name in ("rate_ratio", "my study 2", "größe", "a.b", "x" * 100):
        assert check_name(name) == name


def test_braces_in_a_storages_name_are_only_braces(tmp_path):
    with open_storage(f"sqlite:///{tmp_path}/{{a: 1}}.db"):
        pass
    assert (tmp_path / "{a: 1}.db").is_file()


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        if path.name == "link":
            path.symlink_to("/dev/null")
        with pytest.raises(UsageError, match="is a device or a pipe"), atomic_write(path) as new:
            new.write_text("x")
        with pytest.raises(UsageError, match="is a device or a pipe"):
            check_file(path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trainer.accelerator", "tpu", ("trainer", "torch_xla")),
        ("trainer.devices", "٣", ("trainer.devices", "0 to 9")),
        ("trainer.gradient_clip_val", ".inf", ("gradient_clip_val", "inf")),
        ("model.decoder.init_args.width", "3000000", ("3000000", "GiB", "smaller")),
        ("model.decoder.init_args.thoughts", "-1", ("thoughts", "-1")),
        ("model.inference.rate", "-0.3", ("rate", "-0.3")),
        ("model.inference.kl_weight", ".inf", ("kl_weight", "inf")),
        ("model.curriculum.steps", "[[0.5,4],[0.2,8]]", ("curriculum.steps", "rises")),
        ("data.workers", "5000", ("5000 workers",)),
    ],
)
def test_recipes_with_impossible_numbers(recipe, refused, tmp_path, key, value, words):
    message = refused("fit", "--config", recipe, "--run", tmp_path / "run", f"--{key}", value)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())
