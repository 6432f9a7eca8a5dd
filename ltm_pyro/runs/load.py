"""Loading a trained model: a run directory, a checkpoint, or a folder that `ltm export` wrote."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ltm_pyro.data.tokenizer import load_tokenizer
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run
from ltm_pyro.training.model_config import build_from_recipe, parse_model
from ltm_pyro.training.run_directory import RECIPE, TOKENIZER, load_weights, read_checkpoint
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.rng import seeded

WEIGHTS = "model.safetensors"  # of an exported run
SAFETENSORS = ("safetensors.torch", "hub", "Sharing a model")
UNSAFE = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # what may hold a pickle


def load_run(path: str | Path, device: str = "cpu") -> Run:
    """A run directory, a checkpoint or a folder that `ltm export` wrote, in evaluation mode.

    Nothing in it is unpickled, but its recipe names prior and guide by dotted path, and those modules are imported.
    """
    if is_export(path):
        run = from_pretrained(path)
    else:
        checkpoint = read_checkpoint(path)
        texts = checkpoint["ltm_pyro"]
        run = build_run(texts["recipe"], texts["tokenizer"], checkpoint["state_dict"], path)
    return run.to(device)._replace(source=str(Path(path).resolve()))


def is_export(path: str | Path) -> bool:
    """Whether a folder is what `ltm export` wrote."""
    return (Path(path) / WEIGHTS).is_file()


def build_run(recipe: str, tokenizer: str, weights: Mapping[str, torch.Tensor], source: str | Path) -> Run:
    """A run from its parts; the weights must be those of the recipe's model, name by name."""
    config = parse_model(recipe, source)
    config.model.compile = False  # that was for training: one line of text need not wait for the compiler
    with seeded(0):  # the weights that are drawn are replaced, and torch's global generator stays as it was
        built = build_from_recipe(config)
    parts = {"model": built.model, "guide": built.guide}
    modules = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    modules.register_buffer("flops", torch.zeros((), dtype=torch.float64))  # which training saves with the weights
    load_weights(modules, weights, source)
    modules.eval()
    return Run(
        model=built.model,
        guide=built.guide,
        tokenizer=load_tokenizer(f"{source}: its {TOKENIZER}", tokenizer.encode()),
        inference=replace(built.evaluation, cuda_graph=False),  # that too, and it may be loaded onto a CPU
        data=config.data.directory,
        length=config.model.decoder.init_args.length,
    )


def from_pretrained(folder: str | Path) -> Run:
    """A folder that `save_pretrained` wrote, in evaluation mode on the CPU, its weights the recipe's name by name.

    Nothing is unpickled, and a folder that holds what could be is refused. The recipe names prior and guide by dotted
    path, and those modules are imported.
    """
    folder = Path(folder)
    if unsafe := sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE):
        raise UsageError(
            f"{folder} holds {unsafe[0]}, which may run code when it is loaded: remove it from the folder."
        )
    for name in (WEIGHTS, RECIPE, TOKENIZER):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}: give a folder that `ltm export` wrote, whole.")
    try:
        weights = extra(*SAFETENSORS).load_file(folder / WEIGHTS)
        recipe, tokenizer = ((folder / name).read_text("utf-8") for name in (RECIPE, TOKENIZER))
    except Exception as error:  # safetensors raises its own, which is no ValueError
        raise UsageError(f"{folder} cannot be read ({error}): export the run again.") from None
    return build_run(recipe, tokenizer, weights, folder)
