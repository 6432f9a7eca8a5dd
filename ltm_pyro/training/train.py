"""One training, from a recipe to a run directory."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from tokenizers import Tokenizer

from ltm_pyro.data.dataset import open_pack
from ltm_pyro.data.tokenizer import load_tokenizer, tokenizer_hash
from ltm_pyro.errors import UsageError
from ltm_pyro.training.check_model import check_labels, check_model, check_state
from ltm_pyro.training.checkpoints import Checkpoints, Saving
from ltm_pyro.training.cost_summary import cost_summary
from ltm_pyro.training.metrics import MetricsFile
from ltm_pyro.training.model_config import build_from_recipe
from ltm_pyro.training.module import LTMModule
from ltm_pyro.training.progress import Progress
from ltm_pyro.training.ranks import Ranks
from ltm_pyro.training.recipe import build, changed_settings, check_budget, check_data, dump_recipe, lightning_complaint
from ltm_pyro.training.run_directory import (
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
from ltm_pyro.training.trust import own_sources, remember_recipe
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.files import DISK_IS_FULL, DiskFullError, local_path, lock_folder
from ltm_pyro.utils.processes import end_with_parent, end_with_starter, signals_as_before

NOISE = (  # Lightning's warnings that no user can do anything about
    ".*(does not have many workers|LeafSpec|lr_scheduler.step|training_step. returned .None|isinstance.treespec"
    "|Experiment logs|ended before the epoch ended).*"
)
LAST = "last"  # as `ckpt_path`: the run's own checkpoint, or none if there is none yet


class Interrupted(KeyboardInterrupt):
    """The user stopped the training; the message says where it was saved and how to resume it."""


def train(config: Namespace, callbacks: Sequence[Any] = ()) -> Path:
    """Trains as a recipe says and returns the run directory.

    Only the first rank checks and writes the run directory, and prints the costs.

    Args:
        config: a recipe, from `ltm_pyro.training.recipe.read_recipe`.
        callbacks: Lightning callbacks besides the recipe's.

    Raises:
        UsageError: recipe, data or checkpoint do not allow this training (nothing is written then), or it failed.
        Interrupted: after Ctrl-C or SIGTERM; the checkpoint is written by then.
    """
    check_budget(config)
    check_data(config)
    run, first = local_path(config.run, "--run"), cast(Any, rank_zero_only).rank == 0
    if first:
        busy = f"Another process trains {run} right now: wait for it, or choose another --run."
        with lock_folder(run, busy, "--run"):
            return _train(config, callbacks, run, first)
    end_with_starter()
    end_with_parent()  # which is the first rank, or a launcher
    return _train(config, callbacks, run, first)


def _train(config: Namespace, callbacks: Sequence[Any], run: Path, first: bool) -> Path:
    resumed = _resumed(config, run)
    keep = resumed is not None and resumed.resolve().is_relative_to(run.resolve())
    if first:
        check_run(run, config.force, keep)
    manifest, tokenizer = open_pack(config.data.directory)
    recipe, text = dump_recipe(config), tokenizer.to_str()
    content = _content(resumed or config.warm_start, tokenizer)
    log = MetricsFile(run / METRICS, *(content["global_step"], content.get("metrics_rows")) if keep else ())

    def start_run() -> None:
        write_run(run, recipe, text, own_sources(recipe), keep)
        remember_recipe(recipe)
        log.resume()
        console = Console(stderr=True)
        console.print(costs)
        if changed:
            console.print(f"Resumed with other settings than before: {', '.join(changed)}.", soft_wrap=True)

    saver = Checkpoints(run / CHECKPOINT, recipe, text, Saving(**config.checkpoints.as_dict()), start_run)
    changed = changed_settings(content["ltm_pyro"]["recipe"], recipe, resumed) if resumed else []
    ranks = Ranks()
    module, data, trainer = build(config, callbacks=[Progress(), *callbacks, ranks, saver], logger=[log])
    ranks.prepare(trainer)
    if resumed:
        data.check(content.get("PackedData") or {}, trainer.world_size)
        load_weights(module, content["state_dict"], resumed)
    elif config.warm_start:
        add_thoughts(module, content["state_dict"], config.warm_start)
    check_labels(module.model, manifest.labels, config.data.directory)
    check_model(module.model, module.guide, module.leaves_out_thoughts)
    if not type(module.model.prior).__module__.startswith("ltm_pyro."):
        check_state(module.model, lambda: build_from_recipe(config).model)
    costs = cost_summary(module, config, trainer.world_size) if first else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        _fit(trainer, module, data, run, resumed, saver, ranks)
    if first and not (saver.has_started or keep):
        raise UsageError(
            f"Nothing was trained, and {run} is as it was, because the budget was already spent at step "
            f"{trainer.global_step}: raise the budget."
        )
    return run


def _resumed(config: Namespace, run: Path) -> Path | None:
    """The checkpoint file to resume from, if any."""
    if config.ckpt_path == LAST:
        path = run / CHECKPOINT
        return path if path.exists() else None
    return checkpoint_path(config.ckpt_path) if config.ckpt_path else None


def _content(checkpoint: str | Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a checkpoint, empty without one; refuses a checkpoint whose tokenizer is not the data's."""
    if not checkpoint:
        return {}
    content = read_checkpoint(checkpoint)
    learned = load_tokenizer(f"{checkpoint}: its {TOKENIZER}", content["ltm_pyro"]["tokenizer"].encode())
    if tokenizer_hash(learned) != tokenizer_hash(tokenizer):
        raise UsageError(
            f"The checkpoint {checkpoint} was trained with another tokenizer than the data's: pack the data again "
            f"with --tokenizer and the run's {TOKENIZER}."
        )
    return content


def error_message(error: BaseException) -> str:
    """An error's message; DataLoader workers, which prefetch, put a traceback before it."""
    return str(error).rsplit("UsageError: ", 1)[-1].strip()


def _fit(
    trainer: Any,
    module: LTMModule,
    data: Any,
    run: Path,
    resumed: Path | None,
    saver: Checkpoints,
    ranks: Ranks,
) -> None:
    try:
        with signals_as_before():
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except DiskFullError:
        raise
    except UsageError as error:
        raise UsageError(error_message(error)) from None
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        if saver.has_started and not isinstance(error, MisconfigurationException):
            raise
        raise UsageError(lightning_complaint(error)) from None
    except SystemExit:  # which Lightning raises after Ctrl-C
        if not (run / CHECKPOINT).exists():
            raise Interrupted(f"interrupted before the first step; {run} holds no checkpoint yet.") from None
        raise Interrupted(
            f"interrupted at step {trainer.global_step}; "
            f"resume with: ltm fit --config {run / RECIPE} --ckpt_path {run / CHECKPOINT}"
        ) from None
    except RuntimeError as error:
        if ranks.is_lost(trainer, error):
            raise UsageError(
                f"Another rank was lost, or did not answer in time, at step {trainer.global_step}: see what it said, "
                f"and {_advice(run)}."
            ) from None
        if "DataLoader worker" not in str(error):
            raise
        raise UsageError(
            f"A worker process of the data was killed at step {trainer.global_step}, most often because the machine "
            f"ran out of memory: lower `data.workers`, and {_advice(run)}."
        ) from None
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise DiskFullError(
            f"The disk under {run} is full at step {trainer.global_step}: free some space and {_advice(run)}."
        ) from None


def _advice(run: Path) -> str:
    saved = (run / CHECKPOINT).exists()
    return f"resume with --ckpt_path {run / CHECKPOINT}" if saved else "train again with --force"
