"""Run directories: what training writes, and what is loaded from them.

A run holds ``config.yaml``, ``tokenizer.json``, ``metrics.csv`` and ``checkpoints/last.ckpt``; the checkpoint alone is
enough, because recipe and tokenizer travel in it. Copies of the user's own code that the recipe names are in ``code/``.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from ltm_pyro.errors import UsageError
from ltm_pyro.training.trust import COPIES
from ltm_pyro.utils.files import atomic_write, new_folder, writing

CHECKPOINT = Path("checkpoints") / "last.ckpt"
RECIPE = "config.yaml"
METRICS = "metrics.csv"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"  # of an exported run


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint file of a run directory, or the file itself, loaded with ``weights_only=True``."""
    file = checkpoint_path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler may raise anything if a file is cut or changed
        # torch writes zip archives, in which the table of contents comes last
        older = [x for x in sorted(file.parent.glob("step-*.ckpt"), reverse=True) if x != file and is_zipfile(x)]
        advice = f"give {older[0]}, which is whole" if older else "give one that `ltm fit` wrote"
        raise UsageError(f"{file} is cut, or no checkpoint that can be loaded safely: {advice}.") from None
    if not isinstance(checkpoint, dict) or "ltm_pyro" not in checkpoint:
        raise UsageError(f"{file} was not written by `ltm fit`: it holds no recipe; give one that was.")
    texts, weights = checkpoint["ltm_pyro"], checkpoint.get("state_dict")
    whole = isinstance(texts, dict) and all(isinstance(texts.get(name), str) for name in ("recipe", "tokenizer"))
    whole = whole and isinstance(weights, dict) and all(isinstance(x, torch.Tensor) for x in weights.values())
    if not whole:
        raise UsageError(f"{file} is damaged, because recipe, tokenizer or weights are missing: give a whole one.")
    return checkpoint


def checkpoint_path(path: str | Path) -> Path:
    """The checkpoint file of a run directory; a file is returned as it is."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"There is no run at {path}: give a run directory or a checkpoint that `ltm fit` wrote.")
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"Run {path} has no checkpoint at {file}: train it first (`ltm fit --run {path} …`).")
    return file


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Loads a state dict strictly; `UsageError` names the first weight that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(x[name].shape) if name in x else "absent" for x in (own, weights))
        if here != there:
            raise UsageError(
                f"The checkpoint {source} is of another architecture: '{name}' is {there} there and {here} in the "
                f"recipe; use the recipe it was trained with."
            )
    module.load_state_dict(weights)


def add_thoughts(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Loads the weights of a run without thoughts (K = 0) into a module with thoughts, its cross-attention adding zero.

    The first bound therefore equals that run's loss. FLOPs that the run has spent count as spent by the module.
    """
    own = module.state_dict()
    new = {name for name in own if ".cross_attention." in name or ".norm_cross." in name}
    if not new or new & weights.keys():
        problem = "the recipe has no thoughts" if not new else f"{source} has thoughts"
        raise UsageError(
            f"A warm start adds thoughts to a run without them, but {problem}: set `model.decoder.init_args.thoughts` "
            f"to 0 for the run to begin from, and to more for the new one."
        )
    zeroed = {n: torch.zeros_like(own[n]) if n.endswith("output.weight") else own[n] for n in new}
    load_weights(module, {**weights, **zeroed}, source)


def check_run(path: Path, force: bool, resumed: bool) -> None:
    """Refuses a directory with files of a run, unless with ``force`` or if it is ``resumed``; other files are kept."""
    there = [str(name) for name in (RECIPE, METRICS, CHECKPOINT, TOKENIZER) if (path / name).exists()]
    if there and not (force or resumed):
        raise UsageError(
            f"{path} holds a {there[0]} already: choose another --run, resume with --ckpt_path, or add --force."
        )


def write_copies(path: Path, sources: Mapping[str, bytes]) -> None:
    """Writes copies of the user's code below a run or an export; other files there are never touched."""
    if sources:
        (path / COPIES).mkdir(exist_ok=True)
    for name, content in sources.items():
        with atomic_write(path / COPIES / name) as new:
            new.write_bytes(content)


def write_run(path: Path, recipe: str, tokenizer: str, sources: Mapping[str, bytes], keep: bool) -> None:
    """Writes recipe, tokenizer and copies of the user's code; unless ``keep``, deletes what an earlier run measured.

    The earlier files are deleted after the new ones are on the disk. A failure leaves nothing new behind.
    """
    files = {path / RECIPE: recipe.encode(), path / TOKENIZER: tokenizer.encode()}
    with writing(f"the run {path}", "--run"), new_folder(path / CHECKPOINT.parent), ExitStack() as replaced:
        for file, content in files.items():
            replaced.enter_context(atomic_write(file)).write_bytes(content)
        write_copies(path, sources)
        for leftover in (path / CHECKPOINT.parent).glob("*.ckpt.*.new"):  # of a training that was killed
            leftover.unlink(missing_ok=True)
        for old in () if keep else (path / METRICS, *(path / CHECKPOINT.parent).glob("*.ckpt")):
            old.unlink(missing_ok=True)
