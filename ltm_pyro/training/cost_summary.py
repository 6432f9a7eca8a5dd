"""What a training will cost: parameters, floating-point operations and memory, shown before it begins."""

from typing import Any

import torch
from jsonargparse import Namespace
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ltm_pyro.contracts import make_batch
from ltm_pyro.data import read_manifest
from ltm_pyro.inference.elbo import elbo_terms
from ltm_pyro.inference.local import init
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.training.datamodule import BATCH_SIZE
from ltm_pyro.training.flops import flops_per_token
from ltm_pyro.training.module import LTMModule
from ltm_pyro.utils.rng import seeded

_PER_PARAMETER = 16  # bytes: weight, gradient and Adam's two moments in float32


def cost_summary(module: LTMModule, config: Namespace, ranks: int) -> Table:
    """The cost as a table; a curriculum that changes local inference is left out of account."""
    decoder, length = module.model.decoder, read_manifest(config.data.directory).seq_len
    tokens = tokens_per_step(config) * ranks
    rows = tokens_per_step(config) // length // config.trainer.accumulate_grad_batches
    inference = module.inference if module.keep_local else module.inference.from_start()
    fast, slow = flops_per_token(decoder, module.guide, length, inference)
    table = Table("plan", "", title=str(config.run), title_justify="left")
    for part, count in parameters(module).items():
        table.add_row(part, f"{count:,}")
    table.add_row("precision", str(config.trainer.precision or "32-true"))
    table.add_row("thoughts per sequence (L x K x D)", " x ".join(map(str, decoder.thought_shape)))
    table.add_row("fast steps, slow gradient", f"{inference.steps}, {inference.slow_gradient}")
    table.add_row("FLOPs per token, fast + slow", f"{fast / 1e6:,.1f} M + {slow / 1e6:,.1f} M")
    table.add_row("FLOPs per step, fast + slow", f"{fast * tokens / 1e12:,.3f} T + {slow * tokens / 1e12:,.3f} T")
    table.add_row("tokens per step", f"{tokens:,}" + (f" on {ranks} ranks" if ranks > 1 else ""))
    table.add_row("memory per rank, about", f"{memory(module, rows, length) / 2**30:,.2f} GiB")
    return table


def tokens_per_step(config: Namespace) -> int:
    """The tokens of one rank's slow step, with padding: of rows of documents at most so many."""
    data, manifest = config.data, read_manifest(config.data.directory)
    rows = (data.batch_size or BATCH_SIZE) if data.tokens is None else data.tokens // manifest.seq_len
    whole = manifest.rows == "stream" or data.tokens is None
    return (rows * manifest.seq_len if whole else data.tokens) * config.trainer.accumulate_grad_batches


def parameters(module: LTMModule) -> dict[str, int]:
    """How many parameters the model and each of its parts have; parts without any are left out."""
    model: Any = module.model
    total, parts = {"parameters": model}, {f"  {name}": part for name, part in model.named_children()}
    inner = {f"  decoder.{name}": part for name, part in model.decoder.named_children()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in (total | parts | inner).items()}
    return {name: count for name, count in counts.items() if count}


def memory(module: LTMModule, batch_size: int, length: int) -> int:
    """Bytes for parameters, their gradients, Adam's moments, and the activations that one ELBO saves for backward.

    Activations are measured on one sequence in the precision of the weights. Temporary buffers of operations and the
    process itself are not counted.
    """
    weights = {p.untyped_storage().data_ptr(): p for p in module.model.parameters()}
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    batch: Any = make_batch(torch.ones(1, length, dtype=torch.long), torch.tensor([length]), start_token=0)
    with seeded(0), no_param_store(module.model), saved_tensors_hooks(save, lambda x: x):
        local = init(module.model, module.guide, batch, module.inference).parameters
        local = {name: x.requires_grad_() for name, x in local.items()}
        terms = elbo_terms(module.model, module.guide, module.model.prepare(batch), local, module.inference.draws)
    activations = sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in weights)
    del terms
    return _PER_PARAMETER * sum(p.numel() for p in weights.values()) + batch_size * activations
