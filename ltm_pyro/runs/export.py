"""A trained model to share: weights as safetensors, recipe, tokenizer, and a card that says what the figures mean."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.runs.load import SAFETENSORS, build_run, is_export
from ltm_pyro.runs.run import Run
from ltm_pyro.training.run_directory import RECIPE, TOKENIZER, WEIGHTS, read_checkpoint, write_copies
from ltm_pyro.training.trust import copies_beside
from ltm_pyro.utils.extras import extra
from ltm_pyro.utils.files import atomic_write, check_folder, local_path, new_folder, writing
from ltm_pyro.utils.threads import one_at_a_time

CARD = "README.md"


@one_at_a_time
def save_pretrained(
    run: str | Path,
    folder: str | Path,
    figures: Mapping[str, Any] | None = None,
    force: bool = False,
    trust: bool = False,
) -> Path:
    """Writes a run's checkpoint as a folder that `load_run` takes, and that can be put on the Hugging Face hub.

    Copies of the user's own code that the run has, in ``code/``, go with it.

    Args:
        figures: name to number, for the card's table.
        force: replaces such a folder; other files are never touched.
        trust: as in `load_run`.
    """
    torch_file, folder = extra(*SAFETENSORS), local_path(folder, "--out")
    check_folder(folder, "--out")
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not is_export(folder):
        raise UsageError(f"{folder} exists and is no export, because it has no {WEIGHTS}: choose another --out.")
    if taken and not force:
        raise UsageError(f"{folder} exists already: choose another --out, or add --force.")
    checkpoint = read_checkpoint(run)
    texts = checkpoint["ltm_pyro"]
    loaded = build_run(texts["recipe"], texts["tokenizer"], checkpoint["state_dict"], run, trust)
    with writing(folder), new_folder(folder), ExitStack() as replaced:
        # each weight has memory of its own there, also one that the model has under two names
        weights = {
            name: weight.clone(memory_format=torch.contiguous_format)
            for name, weight in checkpoint["state_dict"].items()
        }
        files = {  # replaced from the last to the first: with its weights a folder is an export
            WEIGHTS: torch_file.save(weights, metadata={"format": "pt"}),  # safetensors' save_file writes mode 0600
            CARD: card(loaded, figures or {}).encode(),
            TOKENIZER: texts["tokenizer"].encode(),
            RECIPE: texts["recipe"].encode(),
        }
        for name, content in files.items():
            replaced.enter_context(atomic_write(folder / name)).write_bytes(content)
        copies = copies_beside(run)
        write_copies(folder, {x.name: x.read_bytes() for x in sorted(copies.glob("*.py"))} if copies else {})
    return folder


_ABOUT = (
    "# A Latent-Thought Language Model",
    "",
    "A decoder that reads a few latent vectors of each text, its thoughts, inferred by a few gradient steps",
    "([arXiv 2502.01567](https://arxiv.org/abs/2502.01567)). Made with ltm_pyro.",
)
_ABOUT_BASELINE = (
    "# A baseline of Latent-Thought Language Models",
    "",
    "A language model without latent vectors, of the same trunk. Made with ltm_pyro.",
)


def card(run: Run, figures: Mapping[str, Any]) -> str:
    """What a reader of the hub sees first."""
    decoder: Any = run.model.decoder
    _, thoughts, width = decoder.thought_shape
    window = "all" if decoder.window is None else decoder.window
    lines = [
        "---",
        "library_name: ltm_pyro",
        "pipeline_tag: text-generation",
        "tags: [latent-thought-model, variational-bayes, pyro]",
        "---",
        "",
        *(_ABOUT if thoughts else _ABOUT_BASELINE),
        "",
        "| | |",
        "| --- | --- |",
        f"| parameters | {sum(p.numel() for p in run.model.parameters()):,} |",
        f"| prior, guide | `{_dotted(run.model.prior)}`, `{_dotted(run.guide)}` |",
        f"| layers, width, window, length | {decoder.layers}, {decoder.width}, {window}, {run.length} |",
        f"| thoughts per layer, their width | {thoughts}, {width} |",
        f"| vocabulary | {decoder.vocabulary:,} |",
        f"| fast steps, rate (evaluation) | {run.inference.steps}, {run.inference.rate} |",
        *(f"| {name} | {value:.4g} |" for name, value in figures.items()),
        "",
        "```",
        "ltm generate FOLDER --prompt 'Once upon a time'",
        "ltm evaluate FOLDER --data TEXT",
        "```",
        "",
        "In Python: `run = ltm_pyro.load_run(FOLDER)`. Its likelihoods are bounds or predictive estimates, as each",
        "estimator says; compare them with an autoregressive model's under `causal`.",
        "",
        "Intended use, training data, licence and limits: to be filled in by whoever shares this model.",
        "",
    ]
    return "\n".join(lines)


def _dotted(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"
