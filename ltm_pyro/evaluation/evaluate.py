"""One run, scored on one text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ltm_pyro.data import PackedDataset, load_text_or_pack
from ltm_pyro.data.manifest import is_pack
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.elbo import log_weights
from ltm_pyro.inference.estimators import DEFAULT, Evaluation, evaluate, fit_problem
from ltm_pyro.inference.pareto import pareto_k
from ltm_pyro.runs.run import Run
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.rng import seeded

BATCH = 32  # sequences fitted together
TOGETHER = 8  # draws of all of them that are held in memory at once


def evaluate_run(
    run: Run,
    data: str | None = None,
    estimators: Sequence[str] = DEFAULT,
    samples: int = 16,
    fast_steps: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    block: int = 16,
    normaliser: int | None = None,
) -> Evaluation:
    """A run's evaluation on packed data, or on text packed on the fly with its tokenizer.

    Args:
        data: the held-out part of the run's own data when not given.
        estimators: of `ESTIMATORS`.
        samples: S, draws per sequence made after q is final.
        fast_steps: T_fast; what the recipe says under ``evaluation`` when not given.
        limit: only the first so many sequences.
        seed: of all noise.
        block: tokens of one block of ``causal``.
        normaliser: draws with which an unnormalised prior's constant is estimated; figures that use it are no bounds.
    """
    if normaliser:
        _estimate(run.model, normaliser)
    inference = run.inference if fast_steps is None else replace(run.inference, steps=fast_steps)
    dataset = held_out(run) if data is None else load_text_or_pack(data, run.tokenizer, run.length)
    chosen = Subset(dataset, range(len(dataset))[:limit])
    batches = DataLoader(chosen, batch_size=BATCH, collate_fn=dataset.collate)
    console = Console(stderr=True)
    shown = track(batches, "scoring", console=console, transient=True, disable=not console.is_terminal)
    moved = (batch.to(run.device) for batch in shown)
    return evaluate(run.model, run.guide, moved, inference, estimators, samples, seed, block)


def _estimate(model: Any, samples: int) -> None:
    parts = [part for part in model.modules() if hasattr(part, "estimate_normaliser")]
    if not parts:
        raise UsageError("This run's prior is normalised: there is nothing to estimate, leave --normaliser out.")
    with seeded(0):
        for part in parts:
            value, error = part.estimate_normaliser(samples)
            text = f"log normaliser of {type(part).__name__}: {value:.4f} ± {error:.4f} nats per sequence, estimated"
            Console(stderr=True).print(text)


def k_hat(run: Run, sequences: int, draws: int, seed: int = 0) -> Tensor:
    """Pareto k-hat of the first held-out ``sequences`` (B), each from so many draws after q is final: shape (B,)."""
    dataset = held_out(run)
    batch = dataset.collate([dataset[i] for i in range(min(sequences, len(dataset)))]).to(run.device)
    problem = fit_problem(run.model, run.guide, batch, run.inference, draws, (seed,))
    sizes = [min(TOGETHER, draws - done) for done in range(0, draws, TOGETHER)]
    with seeded(seed), torch.no_grad():
        parts = [log_weights(run.model, run.guide, problem.batch, problem.state.parameters, n) for n in sizes]
    return pareto_k(torch.cat(parts))


def held_out(run: Run) -> PackedDataset:
    """The held-out part of a run's own data."""
    if not is_pack(run.data):
        raise UsageError(f"The run's own data is no longer at {run.data}: give --data, packed or text.")
    return load_text_or_pack(run.data, run.tokenizer, run.length)
