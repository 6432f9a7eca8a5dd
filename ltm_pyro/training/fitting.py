"""One training from recipe to run directory: planned, shown, interruptible, resumable."""

import errno
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from ltm_pyro.contracts import UsageError
from ltm_pyro.data import load_tokenizer, read_manifest
from ltm_pyro.data.tokenizer import tokenizer_hash
from ltm_pyro.flops import ours
from ltm_pyro.runs import (
    CHECKPOINT,
    METRICS,
    RECIPE,
    TOKENIZER,
    add_thoughts,
    check_run,
    checkpoint_path,
    load_weights,
    read_checkpoint,
    write_run,
)
from ltm_pyro.training.checkpoints import LastCheckpoint
from ltm_pyro.training.metrics import MetricsFile
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.progress import Progress
from ltm_pyro.training.recipe import build, check_budget, dump_recipe, take_vocabulary

NOISE = (  # what Lightning says that no user can act on
    ".*(does not have many workers|LeafSpec|lr_scheduler.step|training_step. returned .None|isinstance.treespec"
    "|Experiment logs).*"
)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user; the message says where it was saved and how to go on."""


def train(config: Namespace, onlookers: Sequence[Any] = ()) -> Path:
    """Trains as a recipe says and returns the run directory; ``onlookers`` are further Lightning callbacks.

    Raises `UsageError` before anything is written, `Interrupted` after Ctrl-C once the checkpoint is safe.
    """
    check_budget(config)
    take_vocabulary(config)
    run, resumed = Path(config.run), checkpoint_path(config.ckpt_path) if config.ckpt_path else None
    keep = resumed is not None and resumed.resolve().is_relative_to(run.resolve())
    check_run(run, config.force, keep)
    tokenizer = load_tokenizer(Path(config.data.directory) / TOKENIZER)
    recipe, text = dump_recipe(config), tokenizer.to_str()
    callbacks = [Progress(), *onlookers, LastCheckpoint(run / CHECKPOINT, recipe, text)]
    module, data, trainer = build(config, callbacks=callbacks, logger=MetricsFile(run / METRICS, keep))
    if resumed:
        load_weights(module, _weights(resumed, tokenizer), resumed)
    elif config.warm_start:
        add_thoughts(module, _weights(config.warm_start, tokenizer), config.warm_start)
    shown = plan(module, config)
    write_run(run, recipe, text, keep)
    Console(stderr=True).print(shown)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        _fit(trainer, module, data, run, resumed)
    return run


def _weights(checkpoint: str | Path, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A checkpoint's weights; refuses one that has learned another vocabulary than the data's."""
    content = read_checkpoint(checkpoint)
    if tokenizer_hash(Tokenizer.from_str(content["ltm_pyro"]["tokenizer"])) != tokenizer_hash(tokenizer):
        raise UsageError(
            f"The checkpoint {checkpoint} was trained with another tokenizer than the data's: pack the data again "
            f"with --tokenizer and the run's {TOKENIZER}."
        )
    return content["state_dict"]


def _fit(trainer: Any, module: LTMModule, data: Any, run: Path, resumed: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except SystemExit:  # how Lightning leaves after Ctrl-C
        if not (run / CHECKPOINT).exists():
            raise Interrupted(f"interrupted before the first step; {run} holds no checkpoint yet.") from None
        raise Interrupted(
            f"interrupted at step {trainer.global_step}; "
            f"go on with: ltm fit --config {run / RECIPE} --ckpt_path {run / CHECKPOINT}"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        saved = (run / CHECKPOINT).exists()
        advice = f"resume with --ckpt_path {run / CHECKPOINT}" if saved else "train again with --force"
        raise UsageError(
            f"The disk under {run} is full at step {trainer.global_step}: free some room and {advice}."
        ) from None


def plan(module: LTMModule, config: Namespace) -> Table:
    """What the training will cost, before it begins."""
    decoder, length = module.model.decoder, read_manifest(config.data.directory).seq_len
    spent = ours(decoder, length, module.inference)
    table = Table("plan", "", title=str(config.run), title_justify="left")
    parameters = sum(p.numel() for p in module.model.parameters())
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("precision", str(config.trainer.precision or "32-true"))
    table.add_row("thoughts per sequence (L x K x D)", " x ".join(map(str, decoder.thought_shape)))
    table.add_row("fast steps, slow gradient", f"{module.inference.steps}, {module.inference.slow_gradient}")
    table.add_row("FLOPs per token, fast + slow", f"{spent.fast / 1e6:,.1f} M + {spent.slow / 1e6:,.1f} M")
    table.add_row("tokens per step", f"{config.data.batch_size * length * (config.trainer.accumulate_grad_batches):,}")
    return table
