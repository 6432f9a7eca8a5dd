"""One training from recipe to run directory: planned, shown, interruptible, resumable."""

import errno
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from ltm_pyro.contracts import UsageError
from ltm_pyro.data import load_tokenizer, read_manifest
from ltm_pyro.flops import ours
from ltm_pyro.recipe import build, dump_recipe, take_vocabulary
from ltm_pyro.runs import CHECKPOINT, check_run, load_weights, read_checkpoint, write_run
from ltm_pyro.trainer import LastCheckpoint, LTMModule, MetricsFile, Progress

NOISE = ".*(does not have many workers|LeafSpec|lr_scheduler.step|`isinstance.treespec|Experiment logs).*"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user; the message says where it was saved and how to go on."""


def train(config: Namespace) -> Path:
    """Trains as a recipe says and returns the run directory.

    Raises `UsageError` before anything is written, `Interrupted` after Ctrl-C once the checkpoint is safe.
    """
    take_vocabulary(config)
    run, resumed = Path(config.run), config.ckpt_path
    weights = read_checkpoint(resumed)["state_dict"] if resumed else None
    check_run(run, config.force, resumed)
    tokenizer = load_tokenizer(Path(config.data.directory) / "tokenizer.json").to_str()
    recipe = dump_recipe(config)
    checkpoint = LastCheckpoint(run / CHECKPOINT, recipe, tokenizer)
    module, data, trainer = build(config, callbacks=[Progress(), checkpoint], logger=MetricsFile(run))
    if weights is not None:
        load_weights(module, weights, resumed)
    write_run(run, recipe, tokenizer, keep=resumed is not None)
    Console(stderr=True).print(plan(module, config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        _fit(trainer, module, data, config)
    return run


def _fit(trainer: Any, module: LTMModule, data: Any, config: Namespace) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    except SystemExit:  # how Lightning leaves after Ctrl-C
        raise Interrupted(
            f"Interrupted at step {trainer.global_step}; go on with: "
            f"ltm fit --config {config.run}/config.yaml --ckpt_path {Path(config.run) / CHECKPOINT}"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UsageError(
            f"The disk under {config.run} is full at step {trainer.global_step}: the last whole checkpoint is kept; "
            f"free some room and resume with --ckpt_path {Path(config.run) / CHECKPOINT}."
        ) from None


def plan(module: LTMModule, config: Namespace) -> Table:
    """What the training will cost, before it begins."""
    decoder, length = module.model.decoder, read_manifest(config.data.directory).seq_len
    spent = ours(decoder, length, module.inference)
    table = Table("plan", "", title=str(config.run), title_justify="left")
    parameters = sum(p.numel() for p in module.model.parameters())
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("thoughts per sequence (L x K x D)", " x ".join(map(str, decoder.thought_shape)))
    table.add_row("fast steps, slow gradient", f"{module.inference.steps}, {module.inference.slow_gradient}")
    table.add_row("FLOPs per token, fast + slow", f"{spent.fast / 1e6:,.1f} M + {spent.slow / 1e6:,.1f} M")
    table.add_row("tokens per step", f"{config.data.batch_size * length * (config.trainer.accumulate_grad_batches):,}")
    return table
