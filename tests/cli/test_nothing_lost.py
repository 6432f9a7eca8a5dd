"""Locks, moved and damaged runs, killed workers and full disks: one sentence, nothing lost, nothing left behind."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import Callback

import ltm_pyro.analysis.classifiers  # noqa: F401 - joblib, behind it, makes a file when it is first imported
from ltm_pyro.errors import UsageError
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.train import train
from ltm_pyro.utils.files import lock_folder
from tests.processes import alive

SIX = ("--trainer.max_steps", 6, "--checkpoints.every", 1)


def tree(folder):
    """Every file with its content, and every folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def curve(run):
    """All columns of ``metrics.csv`` except times."""
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    return [[cell for i, cell in enumerate(row) if i not in timed] for row in rows]


def step(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.fixture
def whole(recipe, ltm, tmp_path_factory):
    """An undisturbed run of six steps."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert ltm("fit", "--config", recipe, "--run", path, *SIX)[0] == 0
    return path


def test_a_run_is_trained_by_one_process(recipe, refused, tmp_path):
    with lock_folder(tmp_path / "run", "busy", "--run"):
        said = refused("fit", "--config", recipe, "--run", tmp_path / "run", "--force")
        assert f"Another process trains {tmp_path / 'run'} right now" in said
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_one_place(recipe, ltm, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"run": "~/runs/x"}))
    assert ltm("fit", "--config", mine)[0] == 0
    names = {"config.yaml", "tokenizer.json", "metrics.csv", "checkpoints"}
    assert {path.name for path in (tmp_path / "home" / "runs" / "x").iterdir()} == names
    assert "'::'" in refused("fit", "--config", recipe, "--run", "a::b")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_moved_run_is_the_run_of_its_recipe(recipe, ltm, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert ltm("fit", "--config", recipe, "--run", old)[0] == 0
    shutil.move(old, new)
    code, _, err = ltm("fit", "--config", new / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", 5)
    assert code == 0, err
    assert "trainer.max_steps 3 → 5" in err
    assert (step(new), old.exists()) == (5, False)
    assert ltm("fit", "--config", new / "config.yaml", "--run", old)[0] == 0  # as a recipe for another run
    assert step(old) == 5


def test_another_seed_would_train_on_sequences_twice(whole, refused):
    before = tree(whole)
    again = ("fit", "--config", whole / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", 9)
    for option, value in (("seed_everything", 1), ("trainer.limit_train_batches", 5)):
        assert f"was trained with `{option}`" in refused(*again, f"--{option}", value)
    assert tree(whole) == before


@pytest.mark.parametrize("end", ["5,1.2", '"', "\0\0\0\0", "4,1,2,3,4,5,6,7,8,9,10,1"])
def test_a_row_that_was_cut_is_left_out(whole, ltm, end):
    expected, file = curve(whole), whole / "metrics.csv"
    file.write_text(file.read_text() + end)
    code, _, err = ltm("fit", "--config", whole / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", 8)
    assert code == 0, err
    found = curve(whole)
    assert found[: len(expected)] == expected
    assert [row[0] for row in found if row[1]][1:] == [str(i) for i in range(8)]


def test_a_cut_checkpoint_names_the_whole_one_beside_it(recipe, ltm, refused, tmp_path):
    run = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", run, *SIX, "--checkpoints.keep", 3)[0] == 0
    last, older = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "step-000000004.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    (run / "checkpoints" / "step-000000005.ckpt").write_bytes(b"PK cut as well")
    again = ("fit", "--config", run / "config.yaml", "--ckpt_path")
    assert f"{last} is cut, or no checkpoint that can be loaded safely: give {older}" in refused(*again, "last")
    assert f"give {older}" in refused("generate", run)
    assert ltm(*again, older)[0] == 0
    assert step(run) == 6


class KillWorker(Callback):
    """Kills a worker process of the data after four steps."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)


def test_a_killed_worker_of_the_data_costs_no_finished_step(recipe, ltm, tmp_path):
    more = (*SIX, "--trainer.max_steps", 20)  # than the workers have prefetched when one is killed
    whole = tmp_path / "whole"
    assert ltm("fit", "--config", recipe, "--run", whole, *more)[0] == 0
    options = map(str, ("--config", recipe, "--run", tmp_path / "run", *more, "--data.workers", 2))
    sentence = r"^A worker process of the data was killed at step \d+, .*: lower `data.workers`, and resume with"
    with pytest.raises(UsageError, match=sentence):
        train(read_recipe([*options, "--checkpoints.every", "100"]), callbacks=[KillWorker()])
    assert step(tmp_path / "run") >= 4
    assert ltm("fit", "--config", tmp_path / "run" / "config.yaml", "--ckpt_path", "last")[0] == 0
    assert curve(tmp_path / "run") == curve(whole)


CHILD = """
import multiprocessing, os, sys, time
from ltm_pyro.utils.processes import end_with_parent

def child():
    sys.platform = sys.argv[2]
    end_with_parent()
    print(os.getpid(), flush=True)
    while True:
        sum(range(10**6))  # at full load

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
    process.start()
    process.join()
"""


def assert_told_process_ends_with(parent):
    """The process whose number a parent prints has ended five seconds after the parent was killed."""
    told = int(parent.stdout.readline())
    assert alive(told)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 5
    while alive(told) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(told)


@pytest.mark.parametrize(
    ("method", "platform"), [("fork", "linux"), ("spawn", "linux"), ("forkserver", "linux"), ("spawn", "elsewhere")]
)
def test_a_child_ends_with_its_parent(tmp_path, method, platform):
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, tmp_path / "child.py", method, platform]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert_told_process_ends_with(parent)


IMPORTING = """
import multiprocessing, time

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltm_pyro.utils.fork_server", "slow_module"])
    process = context.Process(target=time.sleep, args=(600,))
    process.start()
    process.join()
"""
SLOW_MODULE = """
import os, sys, time
if any("forkserver" in word for word in sys.orig_argv):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_fork_server_ends_with_its_parent_while_it_imports(tmp_path):
    """Left alone it notices only when all imports are done."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    (tmp_path / "importing.py").write_text(IMPORTING)
    command, paths = [sys.executable, tmp_path / "importing.py"], {"PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | paths)
    assert_told_process_ends_with(parent)


@contextmanager
def full_after(size):
    """Inside, no file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Texts for the commands that read some."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "texts.jsonl").write_text('{"text": "the old day"}\n' * 4)
    (folder / "data").mkdir()
    (folder / "data" / "ptb.valid.txt").write_text("the people read a long text about time. " * 5)
    return folder


SIZES = (0, 500, 5_000, 50_000, 500_000)
WRITING = {  # command -> its arguments; {} is a folder in which it writes
    "data pack": ("{corpus}", "--out", "{}/deep/pack", "--seq-len", 16, "--tokenizer", "bpe:280"),
    "posterior": ("{run}", "--input", "{material}/texts.jsonl", "--out", "{}/x.nc", "--samples", 30),
    "posterior ": ("{run}", "--input", "{material}/texts.jsonl", "--out", "{}/x.zarr", "--samples", 30),
    "calibrate": ("{run}", "--simulations", 20, "--samples", 9, "--out", "{}/x.nc", "--picture", "{}/x.png"),
    "check-prior": ("{run}", "--samples", 2, "--picture", "{}/x.png"),
    "report": ("{material}/posterior.nc", "--out", "{}/x.html"),
    "show": ("{run}", "--svg", "{}/x.svg"),
    "new": ("prior", "SlabAndSpike", "--out", "{}/deep/folder"),
    "export": ("{run}", "--out", "{}/deep/folder"),
    "evaluate ": ("{run}", "--by-document", "{}/x.jsonl", "--limit", 2, "--samples", 1, "--fast-steps", 1),
    "study best": ("--storage", "sqlite:///{material}/studies.db", "--out", "{}/deep/best.yaml"),
    "study report": ("--storage", "sqlite:///{material}/studies.db", "--out", "{}/deep/report"),
    "evaluate": ("{run}", "--suite", "zero-shot", "--suite-dir", "{material}/data", "--out", "{}/deep", "--limit", 2),
}


SPACE = """
'''Which fast rate?'''
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.05, 0.5, log=True)}
checks = False
"""


def study(recipe, folder, storage):
    """The words of a small search, its file in ``folder``."""
    (folder / "rate.py").write_text(SPACE)
    small = ("--budget", "6e8flops", "--limit", 4, "--samples", 2, "--trials", 1)
    return ("run", folder / "rate.py", "--base-config", recipe, "--storage", f"sqlite:///{storage}", *small)


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_is_told_and_leaves_nothing(run, small_batches, corpus, material, ltm, tmp_path, command):
    """No file can be larger than a limit, as on a disk that is full at that moment."""
    places, out = {"run": run, "corpus": corpus, "material": material}, material / "posterior.nc"
    if command == "report" and not out.exists():
        assert ltm("posterior", run, "--input", material / "texts.jsonl", "--out", out, "--samples", 30)[0] == 0
    if command.startswith("study") and not (material / "studies.db").exists():
        search = study(small_batches, material, material / "studies.db")
        assert ltm("study", *search, "--out", material / "trials")[0] == 0
    words = [str(x).replace("{}", str(tmp_path)).format(**places) for x in WRITING[command]]
    codes = []
    for size in SIZES:
        with full_after(size):
            code, out, err = ltm(*command.split(), *words)
        codes.append(code)
        if code == 0:
            break
        assert (code, out) == (2, ""), (size, err)
        assert err.splitlines()[-1].startswith(f"ltm {command.strip()}: ")
        assert "Traceback" not in err
        assert tree(tmp_path) == {}, size
    assert codes[0] == 2
    assert codes[-1] == 0, err


@pytest.mark.parametrize("size", [0, 500, 5_000, 20_000, 100_000, 200_000])
def test_a_disk_that_is_full_in_a_training_loses_nothing(recipe, whole, ltm, tmp_path, size):
    run = tmp_path / "run"
    fit = ("fit", "--config", recipe, "--run", run, *SIX)
    with full_after(size):
        code, out, err = ltm(*fit)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("ltm fit: ")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.new"))
    if not run.exists():
        assert "make room" in err
    code, _, err = ltm(
        *fit, "--ckpt_path", "last", *(() if (run / "checkpoints" / "last.ckpt").exists() else ["--force"])
    )
    assert code == 0, err
    assert curve(run) == curve(whole)


@pytest.mark.slow
def test_a_comparison_on_a_disk_that_is_full_goes_on_later(recipe, ltm, tmp_path):
    options = ("--minutes", 0.04, "--samples", 2, "--limit", 2, "--json")
    compare = ("compare", "--config", recipe, "--out", tmp_path / "deep" / "out", *options)
    for size in (0, 10_000, 100_000):
        with full_after(size):
            code, out, err = ltm(*compare)
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1].startswith("ltm compare: ")
        assert "Traceback" not in err
        assert not list(tmp_path.rglob("*.new"))
        assert size or tree(tmp_path) == {}
    assert "The disk under" in err
    assert "give the same command again" in err
    code, whole, err = ltm(*compare)
    assert code == 0, err
    before = tree(tmp_path)
    with full_after(0):
        assert ltm(*compare)[0] == 2
    assert tree(tmp_path) == before
    assert ltm(*compare)[1] == whole


@pytest.mark.parametrize("size", [1_000, 30_000])  # with 0 torch cannot be imported: it needs a folder for its files
def test_a_study_whose_storage_has_no_room_leaves_nothing(small_batches, tmp_path, size):
    (tmp_path / "here").mkdir()
    words = (
        "study",
        *study(small_batches, tmp_path, tmp_path / "here" / "deep" / "studies.db"),
        "--out",
        tmp_path / "here/x",
    )
    done = subprocess.run(  # its trials have a process of their own, with the same limit
        [sys.executable, "-P", "-m", "ltm_pyro.cli", *map(str, words)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("ltm study run: The disk ")
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path / "here") == {}
