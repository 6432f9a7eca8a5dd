"""Loading a trained model: a run directory, a checkpoint, or a folder that `ltm export` wrote."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ltm_pyro.data.tokenizer import load_tokenizer, vocabulary_size
from ltm_pyro.errors import UsageError
from ltm_pyro.runs.run import Run
from ltm_pyro.training.model_config import build_from_recipe, parse_model
from ltm_pyro.training.run_directory import RECIPE, TOKENIZER, WEIGHTS, load_weights, read_checkpoint
from ltm_pyro.training.trust import may_read_data
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.threads import one_at_a_time

SAFETENSORS = ("safetensors.torch", "hub", "Sharing a model")
UNSAFE = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # what may hold a pickle


@seeded(0)
def load_run(path: str | Path, device: str = "cpu", trust: bool = False) -> Run:
    """A run directory, a checkpoint or a folder that `ltm export` wrote, in evaluation mode.

    Nothing in it is unpickled. Its recipe names prior, guide, decoder and joint model; they are built if they are
    classes of `ltm_pyro.models` and `ltm_pyro.guides`, classes that `ltm_pyro.register_class` has registered, or those
    of a recipe that this user has trained on this machine, its files unchanged.

    Args:
        path: the run.
        device: where the model is put.
        trust: lets the recipe name any other class as well, whose module is then imported and executed, and lets the
            run's own data be read wherever they are. The code is listed on stderr first.

    Raises:
        UsageError: the run names code of others and is not trusted, or it cannot be loaded.
    """
    if is_export(path):
        run = from_pretrained(path, trust)
    else:
        checkpoint = read_checkpoint(path)
        texts = checkpoint["ltm_pyro"]
        run = build_run(texts["recipe"], texts["tokenizer"], checkpoint["state_dict"], path, trust)
    return run.to(device)._replace(source=str(Path(path).resolve()))


def is_export(path: str | Path) -> bool:
    """Whether a folder is what `ltm export` wrote."""
    return (Path(path) / WEIGHTS).is_file()


@one_at_a_time
def build_run(
    recipe: str, tokenizer: str, weights: Mapping[str, torch.Tensor], source: str | Path, trust: bool = False
) -> Run:
    """A run from its parts; the weights must be those of the recipe's model, name by name."""
    config = parse_model(recipe, source, trust)
    config.model.compile = False  # that was for training: one line of text need not wait for the compiler
    with seeded(0):  # the weights that are drawn are replaced, and torch's global generator stays as it was
        built = build_from_recipe(config)
    parts = {"model": built.model, "guide": built.guide}
    modules = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    modules.register_buffer("flops", torch.zeros((), dtype=torch.float64))  # which training saves with the weights
    load_weights(modules, weights, source)
    modules.eval()
    encoder = load_tokenizer(f"{source}: its {TOKENIZER}", tokenizer.encode())
    if (size := vocabulary_size(encoder)) > built.model.decoder.vocabulary:
        raise UsageError(
            f"{source}: its {TOKENIZER} has {size} tokens, and its model {built.model.decoder.vocabulary}: give a run "
            f"that is whole."
        )
    return Run(
        model=built.model,
        guide=built.guide,
        tokenizer=encoder,
        inference=replace(built.evaluation, cuda_graph=False),  # that too, and it may be loaded onto a CPU
        data=config.data.directory,
        length=config.model.decoder.init_args.length,
        may_read_data=may_read_data(config.data.directory, recipe, trust),
        score=config.data.score,
        observe=config.data.observe,
    )


def from_pretrained(folder: str | Path, trust: bool = False) -> Run:
    """A folder that `save_pretrained` wrote, in evaluation mode on the CPU, its weights the recipe's name by name.

    Nothing is unpickled, and a folder that holds what could be is refused. ``trust`` is that of `load_run`.
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
        torch_file, file = extra(*SAFETENSORS), folder / WEIGHTS
        is_utf8 = str(file).encode("utf-8", "replace").decode() == str(file)
        # safetensors maps a file into memory, but opens only names in UTF-8
        weights = torch_file.load_file(file) if is_utf8 else torch_file.load(file.read_bytes())
        recipe, tokenizer = ((folder / name).read_text("utf-8") for name in (RECIPE, TOKENIZER))
    except Exception as error:  # safetensors raises its own, which is no ValueError
        raise UsageError(f"{folder} cannot be read ({error}): export the run again.") from None
    return build_run(recipe, tokenizer, weights, folder, trust)
