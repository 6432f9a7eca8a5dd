"""Commands that are killed at random moments and given again: the same result, and no child outlives them."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ltm_pyro.analysis import Posterior
from ltm_pyro.data import PackedDataset
from ltm_pyro.runs.load import load_run
from tests.processes import alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]  # a study waits 40 s for a dead worker's heartbeat

KILLS = 20  # of each command
SPACE = """
'''Which fast rate?'''
from optuna.distributions import FloatDistribution
space = {"model.inference.rate": FloatDistribution(0.05, 0.5, log=True)}
"""


def start(command, folder):
    words = [str(word).replace("{}", str(folder)) for word in command]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-P", "-m", "ltm_pyro.cli", *words], cwd=folder, **quiet)


def finish(command, folder):
    """Runs a command to its end; how long it took."""
    began = time.monotonic()
    process = start(command, folder)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return time.monotonic() - began


def descendants(pid):
    """The processes below one, by /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def kill(command, folder, after):
    """Kills a command after some seconds, if it has not ended by then; none of its children lives five seconds more.

    Returns whether it has killed it.
    """
    process = start(command, folder)
    try:
        _, err = process.communicate(timeout=after)
        assert process.returncode == 0, err
        return False
    except subprocess.TimeoutExpired:
        children = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 5
        while any(map(alive, children)) and time.monotonic() < until:
            time.sleep(0.05)
        left = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children if alive(pid)]
        process.communicate()
        assert not left
        return True


def training(folder):
    rows = [line.split(",") for line in (folder / "out" / "metrics.csv").read_text().splitlines()]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    state = load_run(folder / "out").model.state_dict()
    return [[x for i, x in enumerate(row) if i not in timed] for row in rows], {n: x.tolist() for n, x in state.items()}


def packed(folder):
    dataset = PackedDataset.open(folder / "out")
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}, len(dataset)


def drawn(folder):
    tree = Posterior.load(folder / "out.nc").tree
    return {f"{n.path}/{k}": np.asarray(x).tolist() for n in tree.subtree for k, x in n.data_vars.items()}


def exported(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if not path.name.endswith(".new")}


def suites(folder):
    return json.loads((folder / "out" / "results.json").read_text())["results"]


def studied(folder):
    with closing(sqlite3.connect(folder / "studies.db")) as database:
        rows = database.execute(
            "select param_name, param_value, value from trials join trial_params using (trial_id) "
            "join trial_values using (trial_id) where state = 'COMPLETE'"
        ).fetchall()
    return sorted(rows)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    (folder / "texts.jsonl").write_text('{"text": "the old day"}\n' * 4)
    (folder / "ptb.valid.txt").write_text("the people read a long text about time. " * 5)
    (folder / "rate.py").write_text(SPACE)
    return folder


COMMANDS = {  # command -> its arguments, of which {} is the folder, and what is read of the result
    "fit": (
        ("fit", "--config", "{recipe}", "--run", "{}/out", "--ckpt_path", "last", "--trainer.max_steps", 60),
        ("--checkpoints.every", 3, "--trainer.val_check_interval", 3, "--data.workers", 2),
        training,
    ),
    "pack": (
        ("data", "pack", "{corpus}", "--out", "{}/out", "--tokenizer", "bpe:280"),
        ("--seq-len", 16, "--force"),
        packed,
    ),
    "posterior": (
        ("posterior", "{run}", "--input", "{material}/texts.jsonl", "--out", "{}/out.nc"),
        ("--samples", 30, "--force"),
        drawn,
    ),
    "export": (("export", "{run}", "--out", "{}/out"), ("--force",), exported),
    "suites": (
        ("evaluate", "{run}", "--suite", "zero-shot", "--suite-dir", "{material}", "--out", "{}/out"),
        ("--source", "ptb={material}/ptb.valid.txt", "--limit", 3, "--samples", 2),
        suites,
    ),
    "study": (
        ("study", "run", "{material}/rate.py", "--base-config", "{recipe}", "--storage", "sqlite:///{}/studies.db"),
        ("--budget", "2e9flops", "--limit", 4, "--samples", 2, "--trials", 2, "--repeats", 0, "--out", "{}/out"),
        studied,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_comes_to_the_same_result(recipe, corpus, run, material, tmp_path, name):
    places = {"recipe": recipe, "corpus": corpus, "run": run, "material": material}
    first, more, result = COMMANDS[name]
    command = [str(x).replace("{}", "\0").format(**places).replace("\0", "{}") for x in (*first, *more)]
    whole = tmp_path / "whole"
    whole.mkdir()
    duration, draw = finish(command, whole), random.Random(name)
    expected, killed = result(whole), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed += kill(command, folder, duration * draw.uniform(0.3, 1.0))
        finish(command, folder)
        assert result(folder) == expected, number
    assert killed >= KILLS // 2
