"""What `ltm fit` leaves behind: a run that can be scored, resumed after Ctrl-C, and survives a full disk."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from ltm_pyro.runs.load import load_run
from ltm_pyro.training.datamodule import PackedData

LTM = (sys.executable, "-P", "-m", "ltm_pyro.cli")


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if not condition():
        process.kill()
        pytest.fail(process.communicate()[1])


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of some kilobytes; only root may."""
    mounted = []

    def mount(kilobytes):
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", path]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_a_run_holds_what_it_needs(run, packed):
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "tokenizer.json"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    trained = load_run(run)
    assert (trained.length, trained.data, trained.inference.steps) == (16, str(packed), 2)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocabulary"] == 280


def test_a_checkpoint_alone_is_a_run(run):
    whole, alone = (load_run(path).model.state_dict() for path in (run, run / "checkpoints" / "last.ckpt"))
    assert all(torch.equal(whole[name], alone[name]) for name in whole)


def test_metrics_have_a_row_per_step_and_per_validation(run):
    steps = [(int(row["step"]), bool(row["train/loss"]), bool(row["val/bound"])) for row in rows(run)]
    assert steps == [(0, True, False), (1, True, False), (1, False, True), (2, True, False)]


def test_the_plan_comes_first(recipe, ltm, tmp_path):
    code, out, err = ltm("fit", "--config", recipe, "--run", tmp_path / "run", "--trainer.max_steps", 1)
    assert (code, out) == (0, "")
    for line in ("parameters", "precision", "FLOPs per token", "tokens per step"):
        assert line in err
    assert err.index("plan") < err.index("training 100%") < err.index("Run written")


def test_a_training_that_logs_nothing_still_shows_how_far_it_is(recipe, ltm, tmp_path):
    quiet = ("--trainer.log_every_n_steps", 0, "--trainer.limit_val_batches", 0)
    code, _, err = ltm("fit", "--config", recipe, "--run", tmp_path / "run", *quiet, "--trainer.max_steps", 11)
    assert code == 0, err
    assert "training 100%" in err
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_same_seed_gives_the_same_weights(recipe, run, ltm, tmp_path):
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "again")[0] == 0
    first, second = (load_run(path).model.state_dict() for path in (run, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_force_replaces_a_run_and_keeps_other_files(recipe, ltm, tmp_path):
    path, quick = tmp_path / "run", ("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert ltm("fit", "--config", recipe, "--run", path, *quick)[0] == 0
    (path / "notes.txt").write_text("mine")
    assert ltm("fit", "--config", recipe, "--run", path, *quick, "--force")[0] == 0
    assert len(rows(path)) == 1
    assert (path / "notes.txt").read_text() == "mine"


def test_a_finished_run_goes_on_from_its_own_config(recipe, ltm, tmp_path):
    path = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", path)[0] == 0
    for most in (5, 7):  # twice, for what is written must be resumable too
        resume = ("--config", path / "config.yaml", "--ckpt_path", path, "--trainer.max_steps", most)
        code, _, err = ltm("fit", *resume)
        assert code == 0, err
    steps = [int(row["step"]) for row in rows(path) if row["train/loss"]]
    seconds = [float(row["seconds"]) for row in rows(path)]
    assert steps == list(range(7))
    assert seconds == sorted(seconds)


def test_epochs_move_the_schedules_too(recipe, ltm, tmp_path):
    path, budget = tmp_path / "run", ("--trainer.max_steps", -1, "--trainer.max_epochs", 2)
    more = ("--trainer.limit_train_batches", 4, "--trainer.limit_val_batches", 0, "--model.slow.warmup", 0.5)
    assert ltm("fit", "--config", recipe, "--run", path, *budget, *more)[0] == 0
    rates = [float(row["train/slow_rate"]) for row in rows(path)]
    assert len(rates) == 8
    assert rates[:5] == sorted(rates[:5])
    assert rates[-1] < max(rates) / 2


def test_ctrl_c_saves_a_checkpoint_that_resumes(recipe, tmp_path, ltm):
    path = tmp_path / "run"
    long = ("--trainer.max_steps", "-1", "--trainer.max_time", "00:00:10:00", "--trainer.limit_val_batches", "0")
    command = [*LTM, "fit", "--config", str(recipe), "--run", str(path), *long]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    try:
        wait_for(lambda: (path / "metrics.csv").exists() and len(rows(path)) > 5, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    step = int(re.search(r"interrupted at step (\d+)", err)[1])
    resume = re.search(r"ltm fit (--config .*)$", err.strip())[1].split()
    assert not list(path.rglob("*.new"))
    before = rows(path)
    used = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Timer"]
    code, _, err = ltm("fit", *resume, "--trainer.max_steps", step + 3)
    assert code == 0, err
    after = rows(path)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 3
    assert all(int(row["step"]) >= step for row in after[len(before) :])
    assert torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step + 3
    assert float(after[len(before)]["seconds"]) >= float(before[-1]["seconds"])
    timer = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Timer"]
    assert timer["time_elapsed"]["train"] > used["time_elapsed"]["train"] > 0


def test_a_disk_that_is_full_before_training(recipe, refused, small_disk):
    disk = small_disk(4)
    message = refused("fit", "--config", recipe, "--run", disk / "run")
    assert "No space left" in message
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_during_training(recipe, ltm, small_disk):
    disk = small_disk(100)  # room for recipe and tokenizer, none for the checkpoint
    code, _, err = ltm("fit", "--config", recipe, "--run", disk / "run")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"ltm fit: The disk under {disk}/run is full at step 3")
    assert not list(disk.rglob("*.new"))


def test_a_failed_save_keeps_the_last_checkpoint(recipe, ltm, tmp_path, monkeypatch):
    path = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", path)[0] == 0
    saved = (path / "checkpoints" / "last.ckpt").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pytorch_lightning.Trainer.save_checkpoint", full)
    resume = ("--config", path / "config.yaml", "--ckpt_path", path / "checkpoints" / "last.ckpt")
    code, _, err = ltm("fit", *resume, "--trainer.max_steps", 5)
    assert code == 2
    assert f"resume with --ckpt_path {path}" in err.splitlines()[-1]
    assert (path / "checkpoints" / "last.ckpt").read_bytes() == saved


def test_a_full_disk_leaves_the_old_run_alone(recipe, refused, run, tmp_path, monkeypatch):
    before = contents(run)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "make room" in refused("fit", "--config", recipe, "--run", run, "--force")
    assert "make room" in refused("fit", "--config", recipe, "--run", tmp_path / "new")
    assert contents(run) == before
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_a_pack(corpus, refused, small_disk):
    disk = small_disk(16)
    assert "No space left" in refused("data", "pack", corpus, "--out", disk / "pack")
    assert not list(disk.iterdir())


def test_a_read_only_folder(corpus, recipe, refused, small_disk):
    disk = small_disk(400)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "Read-only" in refused("data", "pack", corpus, "--out", disk / "pack")
    assert "Read-only" in refused("fit", "--config", recipe, "--run", disk / "run")


def test_flops_counts_what_the_recipe_costs(run, recipe, packed, ltm, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = sum(p.numel() for p in load_run(run).model.parameters())
    for words in ((run / "config.yaml",), (recipe, "--trust")):  # the second's vocabulary is the data's
        code, out, err = ltm("flops", "--config", *words, "--json")
        assert code == 0, err
        assert json.loads(out)["parameters"] == parameters
    assert "are outside the current folder and not read unasked" in refused("flops", "--config", recipe)
    moved = tmp_path / "moved.yaml"
    moved.write_text(recipe.read_text().replace(str(packed), "nowhere"))
    assert "no pack at nowhere to take one from: add `model.vocabulary`" in refused("flops", "--config", moved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can run")
def test_a_cuda_graph_without_a_device_is_refused_before_the_first_step(recipe, ltm, tmp_path):
    options = ("--model.inference.cuda_graph", "true", "--model.inference.slow_gradient", "last")
    warm = ("--model.curriculum.steps", "[[0, 0], [1, 4]]")
    code, _, err = ltm("fit", "--config", recipe, "--run", tmp_path / "run", *options, *warm)
    assert code == 2
    assert err.splitlines()[-1].endswith("and the batch is on cpu: remove `cuda_graph`.")
    assert "training" not in err


def test_padding_is_what_is_neither_scored_nor_observed(recipe, ltm, refused, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": "a day " * (n % 3), "completion": f"of {n} people"}) + "\n" for n in range(60))
    )
    assert ltm("data", "pack", tmp_path / "a.jsonl", "--out", tmp_path / "pack", "--tokenizer", "bpe:280")[0] == 0
    place = (
        "--data.directory",
        tmp_path / "pack",
        "--model.decoder.length",
        128,
        "--data.tokens",
        256,
        "--data.batch_size",
        "null",
        "--trainer.max_steps",
        2,
    )
    completion = ("--data.score", "completion", "--data.observe")
    bad = (*completion, "all", "--model.inference.slow_gradient", "trajectory")
    message = refused("fit", "--config", recipe, *place, "--run", tmp_path / "run", *bad)
    assert "With `data.score: completion` q may see other tokens than are scored" in message
    assert not (tmp_path / "run").exists(), "a setting that cannot be trained is refused before anything is written"
    shares = {}
    for name, options in {"text": (), "seen": (*completion, "all"), "unseen": (*completion, "prompt")}.items():
        words = (*place, "--run", tmp_path / name, "--model.inference.slow_gradient", "last", *options)
        code, _, err = ltm("fit", "--config", recipe, *words)
        assert code == 0, err
        assert re.search(r"tokens per step\s+│ 256\s+│", err)
        shares[name] = [float(row["train/padding"]) for row in rows(tmp_path / name) if row["train/padding"]]
    batches = PackedData(str(tmp_path / "pack"), tokens=256).train_dataloader()
    expected = [1 - batch.mask_BT.double().mean().item() for batch, _ in zip(batches, range(2), strict=True)]
    assert any(expected)
    assert shares["text"] == shares["seen"] == shares["unseen"] == pytest.approx(expected)
