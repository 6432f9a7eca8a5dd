"""Interrupted training resumes exactly: the same batches, random numbers and rates, to the last digit."""

import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch

from ltm_pyro.data import PackedDataset
from ltm_pyro.runs.load import load_run
from ltm_pyro.training import module

LTM = (sys.executable, "-P", "-m", "ltm_pyro.cli")
STEPS = 14
KINDS = [*product(("last", "trajectory"), (0, 2))]  # slow gradient, workers


def options(slow_gradient, workers, **changes):
    """Several epochs of seven steps, checkpoints and validations at no common step."""
    given = {
        "model.inference.slow_gradient": slow_gradient,
        "data.workers": workers,
        "data.batch_size": 150,
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": 5,
        "checkpoints.every": 3,
        "checkpoints.keep": 9,
        **changes,
    }
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def curve(run):
    """All columns of ``metrics.csv`` except times."""
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    return [[cell for i, cell in enumerate(row) if i not in timed] for row in rows]


def weights(run):
    return load_run(run).model.state_dict()


def same(first, second):
    return all(torch.equal(first[name], x) for name, x in second.items())


@pytest.mark.parametrize(
    ("slow_gradient", "workers", "batches", "steps"),
    [
        ("last", 2, 1, (9,)),
        ("trajectory", 0, 1, (6,)),
        ("last", 0, 3, (9,)),  # of seven batches an epoch
        pytest.param("last", 0, 1, (3, 6, 9, 12), marks=pytest.mark.slow),
    ],
)
def test_every_checkpoint_leads_to_the_same_end(recipe, ltm, tmp_path, slow_gradient, workers, batches, steps):
    run, given = tmp_path / "run", options(slow_gradient, workers, **{"trainer.accumulate_grad_batches": batches})
    assert ltm("fit", "--config", recipe, "--run", run, *given)[0] == 0
    whole, final = curve(run), weights(run)
    older = sorted((run / "checkpoints").glob("step-*.ckpt"))
    assert [path.name for path in older] == [f"step-{step:09d}.ckpt" for step in (3, 6, 9, 12)]
    for path in (path for path in older[::-1] if int(path.stem[5:]) in steps):
        code, _, err = ltm("fit", "--config", run / "config.yaml", "--ckpt_path", path)
        assert code == 0, err
        assert curve(run) == whole, path.name
        assert same(final, weights(run))


def test_only_the_newest_checkpoints_stay(recipe, ltm, tmp_path):
    run = tmp_path / "run"
    few = options("trajectory", 0, **{"checkpoints.keep": 2, "checkpoints.every": 1, "trainer.max_steps": 4})
    assert ltm("fit", "--config", recipe, "--run", run, *few)[0] == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "step-000000003.ckpt"]


def test_last_is_the_runs_own_checkpoint_if_there_is_one(recipe, ltm, refused, tmp_path):
    again = ("fit", "--config", recipe, "--run", tmp_path / "run", "--ckpt_path", "last")
    assert ltm(*again)[0] == 0
    code, _, err = ltm(*again, "--trainer.max_steps", 5)
    assert code == 0, err
    assert [int(row[0]) for row in curve(tmp_path / "run")[1:] if row[1]] == list(range(5))
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert "global batch 8, but now it is 4" in refused(*again, "--trainer.max_steps", 7, "--data.batch_size", 4)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(("batches", "step"), [(1, 4), (3, 1)])
def test_an_error_within_a_step_is_saved_before_it(recipe, ltm, tmp_path, monkeypatch, batches, step):
    few = options("last", 0, **{"trainer.max_steps": 6, "trainer.accumulate_grad_batches": batches})
    run = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "whole", *few)[0] == 0
    original, calls = module.training_loss, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no room")
        return original(*arguments)

    monkeypatch.setattr(module, "training_loss", fail)
    code, _, err = ltm("fit", "--config", recipe, "--run", run, *few)
    assert (code, "memory" in err) == (2, True), err
    monkeypatch.undo()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    code, _, err = ltm("fit", "--config", run / "config.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert curve(run) == curve(tmp_path / "whole")


def test_an_error_at_the_first_batch_after_a_resume_is_told(recipe, ltm, tmp_path, monkeypatch):
    again = ("fit", "--config", recipe, "--run", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps")
    assert ltm(*again, 2)[0] == 0

    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(PackedDataset, "collate", fail)
    code, _, err = ltm(*again, 4)
    assert (code, "no room" in err) == (2, True), err
    monkeypatch.undo()
    code, _, err = ltm(*again, 4)
    assert code == 0, err


@pytest.mark.parametrize("budget", ["--trainer.max_steps=3", "--trainer.max_epochs=1", "--model.max_flops=1e6"])
def test_a_finished_run_has_no_step_for_another_directory(recipe, run, ltm, tmp_path, budget):
    ended = tmp_path / "ended"
    fit = ("fit", "--config", recipe, "--trainer.max_steps", -1, "--trainer.limit_val_batches", 0, budget)
    assert ltm(*fit, "--run", ended)[0] == 0
    step = torch.load(ended / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    shutil.copytree(run, tmp_path / "earlier")
    for name, force in (("other", ()), ("earlier", ("--force",))):
        before = {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}
        code, _, err = ltm(*fit, "--run", tmp_path / name, "--ckpt_path", ended, *force)
        assert code == 2
        spent = f"and {tmp_path / name} is as it was, because the budget was already spent at step {step}"
        assert spent in err.splitlines()[-1]
        assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("budget", "steps"), [({"max_epochs": 2}, 6), ({"max_epochs": 2, "max_flops": 1e15}, 6), ({"max_flops": 1}, 1)]
)
def test_budgets_end_with_whole_steps(recipe, ltm, tmp_path, budget, steps):
    given = {("model." if name == "max_flops" else "trainer.") + name: value for name, value in budget.items()}
    of_three = {"trainer.max_steps": -1, "trainer.accumulate_grad_batches": 3, "trainer.limit_val_batches": 0}
    code, _, err = ltm("fit", "--config", recipe, "--run", tmp_path, *options("last", 0, **of_three, **given))
    assert code == 0, err
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows[1:]] == list(range(steps))


@pytest.mark.parametrize(
    ("batches", "end"),
    [(1, 4), (1, 9), (3, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 7), (3, 3), (3, 7)))],
)
def test_a_training_that_has_ended_goes_on_where_it_ended(recipe, ltm, tmp_path, monkeypatch, batches, end):
    """As if ``max_time`` were up: in an epoch or behind it; what a step has read before it is whole comes again."""
    given = {"trainer.max_steps": 12, "trainer.accumulate_grad_batches": batches, "trainer.limit_val_batches": 0}
    few, seen = options("last", 0, **given), []
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "whole", *few)[0] == 0

    def count(self, outputs, batch, index):
        seen.append(index)
        self.trainer.should_stop = len(seen) == end

    monkeypatch.setattr(module.LTMModule, "on_train_batch_end", count)
    assert ltm("fit", "--config", recipe, "--run", tmp_path / "run", *few)[0] == 0
    assert len(seen) == end
    monkeypatch.undo()
    code, _, err = ltm("fit", "--config", tmp_path / "run" / "config.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def killed(command, run, after, number):
    """Starts a training and sends it a signal once ``metrics.csv`` has so many lines; its exit code."""
    process = subprocess.Popen([str(word) for word in command])
    file = run / "metrics.csv"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") > after):
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_sigkill_at_any_step_leaves_the_same_curve(recipe, ltm, tmp_path, trial):
    slow_gradient, workers = KINDS[trial % len(KINDS)]
    common = ("fit", "--config", recipe, *options(slow_gradient, workers, **{"trainer.max_steps": 40}))
    assert ltm(*common, "--run", tmp_path / "whole")[0] == 0
    run = tmp_path / "run"
    again = (*common, "--run", run, "--ckpt_path", "last")
    after = random.Random(trial).randrange(4, 36)
    assert killed([*LTM, *again], run, after, signal.SIGKILL) == -signal.SIGKILL
    code, _, err = ltm(*again)
    assert code == 0, err
    assert curve(run) == curve(tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(run))


@pytest.mark.slow
def test_sigterm_saves_the_step_and_goes_on_exactly(recipe, ltm, tmp_path):
    common = ("fit", "--config", recipe, *options("last", 2, **{"trainer.max_steps": 60, "checkpoints.every": 1000}))
    assert ltm(*common, "--run", tmp_path / "whole")[0] == 0
    again = (*common, "--run", tmp_path / "run", "--ckpt_path", "last")
    assert killed([*LTM, *again], tmp_path / "run", 8, signal.SIGTERM) == 130
    assert ltm(*again)[0] == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
