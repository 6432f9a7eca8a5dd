"""Every stock callback of Lightning resumes exactly at every step, or is refused at the start and leaves nothing."""

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning.callbacks import Callback

from ltm_pyro.training.callbacks import FOR_LOGGERS, REFUSED
from ltm_pyro.training.recipe import read_recipe
from ltm_pyro.training.train import train

STEPS = 10
WORKING = {  # Lightning's callback -> how it is made
    "Callback": lambda: [],
    "DeviceStatsMonitor": lambda: [stock.DeviceStatsMonitor(cpu_stats=False)],
    "EMAWeightAveraging": lambda: [stock.EMAWeightAveraging(decay=0.9, use_buffers=False)],
    "WeightAveraging": lambda: [stock.WeightAveraging(use_buffers=False)],
    "EarlyStopping": lambda: [stock.EarlyStopping("val/bound", min_delta=0.4, patience=2, verbose=False)],
    "LambdaCallback": lambda: [stock.LambdaCallback(on_train_epoch_end=lambda trainer, module: None)],
    "LearningRateMonitor": lambda: [stock.LearningRateMonitor("step")],
    "ModelSummary": lambda: [stock.ModelSummary(max_depth=1)],
    "RichModelSummary": lambda: [stock.RichModelSummary(max_depth=1)],
    "ThroughputMonitor": lambda: [stock.ThroughputMonitor(lambda batch: batch.size, window_size=2)],
    "Timer": lambda: [stock.Timer("00:01:00:00")],
}


COMPARED = (  # of two checkpoints
    *("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "callbacks"),
    *("global_step", "epoch"),
)


class Journal(Callback):
    """What a callback is told, in its state: resumed exactly, it is told everything once."""

    def __init__(self):
        self.lines = []

    def state_dict(self):
        return {"lines": [*self.lines]}

    def load_state_dict(self, state):
        self.lines = [*state["lines"]]


def _note(hook):
    def note(self, trainer, module, *arguments):
        figure = trainer.callback_metrics.get("val/bound") if hook == "on_validation_end" else None
        self.lines.append(f"{hook} {trainer.global_step} {trainer.current_epoch} {figure}")

    return note


for hook in (
    *("on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_batch_end", "on_validation_end"),
):
    setattr(Journal, hook, _note(hook))


@pytest.fixture
def fit(recipe, tmp_path):
    """Trains for ten steps in four epochs, all of them saved; returns the last checkpoint and the curve."""

    def fit(name, interval=2, resumed=None, changes=()):
        run = tmp_path / "run"
        options = {
            "run": run,
            "data.batch_size": 300,
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": interval,
            "checkpoints.every": 1,
            "checkpoints.keep": 2 * STEPS,
            "ckpt_path": resumed,
            **dict(changes),
        }
        if name in FOR_LOGGERS:
            options |= {"trainer.logger": "pytorch_lightning.loggers.CSVLogger", "trainer.logger.save_dir": tmp_path}
        words = [str(x) for key, value in options.items() if value is not None for x in (f"--{key}", value)]
        config = read_recipe(["--config", str(recipe), *words])
        journal, made = Journal(), WORKING[name]()
        for callback in made:
            if isinstance(callback, stock.EarlyStopping):  # patience counts validations, which count batches
                callback.patience *= 2 * config.trainer.accumulate_grad_batches - 1
        train(config, callbacks=[*made, journal])
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        return last, journal.lines, _curve(run)

    return fit


def _curve(run):
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    timed = [i for i, name in enumerate(rows[0]) if "second" in name]
    return [[cell for i, cell in enumerate(row) if i not in timed] for row in rows]


def _same(first, second, path=""):
    """Whether two checkpoints are equal but for times."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            if "Timer" not in str(key):
                _same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            _same(a, b, f"{path}.{i}")
    else:
        assert first == second, path


def _resumes_exactly(fit, tmp_path, name, interval, steps, changes=()):
    last, told, curve = fit(name, interval, changes=changes)
    assert last["global_step"] > 2
    found = sorted((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))
    assert len(found) == last["global_step"] - 1
    for path in [path for path in found[::-1] if int(path.stem[5:]) in steps]:
        last_again, told_again, curve_again = fit(name, interval, path, changes)
        assert told_again == told, path.name
        assert curve_again == curve, path.name
        for key in COMPARED:
            _same(last.get(key), last_again.get(key), key)


def test_every_stock_callback_is_known():
    classes = {name: getattr(stock, name) for name in stock.__all__ if name != "Checkpoint"}
    assert not [n for n, x in classes.items() if n not in WORKING and not {*REFUSED} & {y.__name__ for y in x.__mro__}]
    assert not {*REFUSED} & {*WORKING}


@pytest.mark.parametrize(
    "interval", [2, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 3))]
)  # validations at, within and across the ends of epochs
def test_a_training_resumes_exactly(fit, tmp_path, interval):
    _resumes_exactly(fit, tmp_path, "EarlyStopping" if interval == 2 else "Callback", interval, (1, 2, 3, 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "interval", "batches"),
    [*((name, 2, 1) for name in WORKING), *(("EarlyStopping", n, batches) for n in (1, 3, 5) for batches in (1, 2))],
)
def test_every_working_callback_resumes_exactly_at_every_step(fit, tmp_path, name, interval, batches):
    changes = (("trainer.accumulate_grad_batches", batches),)
    _resumes_exactly(fit, tmp_path, name, interval, range(1, STEPS), changes)


ARGUMENTS = {
    "BackboneFinetuning": {},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5},
    "OnExceptionCheckpoint": {"dirpath": "."},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("BaseFinetuning", "BasePredictionWriter")])
def test_every_other_callback_is_refused_at_the_start(recipe, tmp_path, name):
    config = read_recipe(["--config", str(recipe), "--run", str(tmp_path / "new" / "run")])
    callback = getattr(stock, name)(**ARGUMENTS.get(name, {}))
    with pytest.raises(ValueError, match=rf"^`trainer.callbacks` has {name}, but .*{REFUSED[name]}\.$"):
        train(config, callbacks=[callback])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("callbacks", "EarlyStopping", "EarlyStopping monitors val_loss, which this training does not log"),
        ("callbacks", "LearningRateMonitor", "metrics.csv has no columns for its figures"),
        ("callbacks", "BatchSizeFinder", "set `data.batch_size`"),
        ("fast_dev_run", "true", "`trainer.fast_dev_run` would leave out figures"),
        ("barebones", "true", "`trainer.barebones` would leave out figures"),
        ("gradient_clip_algorithm", "mean", "gradient_clip_algorithm"),
        ("profiler", "fast", "profiler"),
        ("num_nodes", "0", "num_nodes"),
        ("plugins", "nothing", "plugins"),
        ("logger", "nothing", "logger"),
    ],
)
def test_an_option_that_does_not_work_is_refused_and_leaves_nothing(recipe, refused, tmp_path, key, value, sentence):
    more = ("--trainer.callbacks.monitor", "val_loss") if value == "EarlyStopping" else ()
    option = (f"--trainer.{key}", f"pytorch_lightning.callbacks.{value}" if key == "callbacks" else value)
    said = refused("fit", "--config", recipe, "--run", tmp_path / "run", *option, *more)
    assert sentence in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_replaced_stays_until_its_successor_begins(recipe, ltm, refused, tmp_path):
    run = tmp_path / "run"
    assert ltm("fit", "--config", recipe, "--run", run)[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = ("--force", "--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "500")
    assert "val_check_interval" in refused("fit", "--config", recipe, "--run", run, *options)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
