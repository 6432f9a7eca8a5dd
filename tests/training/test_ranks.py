"""Several processes train as one: the same decoder, one log, and no waiting for each other for ever."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from ltm_pyro.data import pack, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.load import load_run
from ltm_pyro.training.recipe import build, read_recipe
from ltm_pyro.utils.processes import is_stopped
from tests.processes import alive

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


@contextmanager
def load(processes):
    """Inside, so many processes compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


class Start:
    """One start of a training on two ranks."""

    def __init__(self, fit, run):
        self.checkpoint, self.began = run / "checkpoints" / "last.ckpt", time.time()
        again = () if self.checkpoint.exists() else ("--force",)
        command = [sys.executable, "-P", "-m", "ltm_pyro.cli", *map(str, (*fit, "--run", run, *again))]
        self.first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.others = []

    def wait(self, until):
        """Waits, also for the other rank to be there; whether the training still runs."""
        while self.first.poll() is None:
            self.others = self.others or self._children()
            if self.others and until():
                return True
            time.sleep(0.05)
        return False

    def _children(self):
        try:
            found = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
            return [pid for pid in map(int, found) if b"ltm_pyro" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        except OSError:
            return []

    def has_saved(self):
        return self.checkpoint.exists() and self.checkpoint.stat().st_mtime > self.began

    def end(self):
        """The exit code, and what was said; fails at a standstill of a minute, and if a rank lives on."""
        _, err = self.first.communicate(timeout=60)
        until = time.monotonic() + 20
        while any(map(alive, self.others)):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "Traceback" not in err
        return self.first.returncode, err


def curve(run):
    """All columns of ``metrics.csv`` except times."""
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    return [[cell for i, cell in enumerate(row) if i not in timed] for row in rows]


LOST = (
    r"ltm fit: (Another rank was lost, or did not answer in time|Rank 1 (was killed by signal 9|has ended with code)"
    r"|Rank 1 has been stopped)"
)
STARTS = int(os.environ.get("LTM_STARTS", "8"))  # 50 take an hour


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_two_ranks_under_load_never_stand_still(recipe, tmp_path):
    """Started, killed, stopped and continued: a lost or slow rank ends the other with a sentence within a minute."""
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.workers", 1, "--checkpoints.every", 3)
    fit = ("fit", "--config", recipe, *ranks, "--trainer.max_steps", 60, "--ckpt_path", "last")
    draw, told, finished, run = random.Random(0), [], 0, tmp_path / "run"
    with load(max(1, os.cpu_count() // 2)):
        began = time.time()
        call("-P", "-m", "ltm_pyro.cli", *fit, "--run", tmp_path / "whole")
        expected, duration = curve(tmp_path / "whole"), time.time() - began
        for number in range(STARTS):
            start, rank = Start(fit, run), draw.randrange(2)
            kind = signal.SIGSTOP if number % 10 == 9 else draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            moment = time.time() + draw.uniform(0.1, 1.0) * duration
            runs = start.wait(start.has_saved if kind == signal.SIGSTOP else lambda moment=moment: time.time() > moment)
            if runs:
                os.kill((start.first.pid, *start.others)[rank], kind)
            if runs and kind == signal.SIGSTOP and rank == 0:  # which then says nothing, but the other ends
                until = time.monotonic() + 60
                while alive(start.others[0]):
                    assert time.monotonic() < until
                    time.sleep(0.1)
                os.kill(start.first.pid, signal.SIGCONT)
            code, err = start.end()
            told.append((number, kind.name if runs else "", rank, code, err.splitlines()[-1] if err else ""))
            if runs and kind != signal.SIGTERM and rank == 1 and code:
                assert code == 2, told
                assert re.search(LOST, err), told
            if code == 0:
                assert curve(run) == expected, told
                shutil.rmtree(run)
                finished += 1
    if run.exists():
        again = [] if (run / "checkpoints" / "last.ckpt").exists() else ["--force"]
        call("-P", "-m", "ltm_pyro.cli", *fit, "--run", run, *again)
        assert curve(run) == expected
    print(f"duration {duration:.0f} s", *told, f"{finished} trainings were finished.", sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_before_its_first_step_ends_the_other_within_a_minute(recipe, tmp_path, rank):
    start = Start(("fit", "--config", recipe, "--trainer.devices", 2, "--trainer.strategy", "ddp"), tmp_path / "run")
    try:
        assert start.wait(lambda: True)  # until the other rank is there, which then imports for seconds
        os.kill((start.first.pid, *start.others)[rank], signal.SIGSTOP)
        until = time.monotonic() + 60
        while alive(start.others[0]) and start.first.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        os.kill(start.first.pid, signal.SIGCONT)
    code, err = start.end()
    assert code == 2, err
    said = (rf"ltm: Process {start.first.pid}, which has started this one,", "ltm fit: Rank 1")[rank]
    assert f"{said} has been stopped: see what it said, and start" in err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_whether_a_process_is_stopped_is_seen_from_outside():
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)
        assert not is_stopped(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_sharded_strategies_are_refused(recipe, tmp_path, strategy):
    config = read_recipe(["--config", str(recipe), "--run", str(tmp_path / "run"), "--trainer.strategy", strategy])
    with pytest.raises(UsageError, match=rf"`trainer.strategy` is {strategy}, but fast steps .*: choose ddp"):
        build(config)
