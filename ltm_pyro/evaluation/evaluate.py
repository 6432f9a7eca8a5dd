"""Evaluation of one run on one data set.

Shapes: B sequences.
"""

from collections.abc import Sequence
from copy import deepcopy
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
TOGETHER = 8  # draws per sequence that are in memory at the same time


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
    """The nats, perplexity and bits per byte of a data set under every estimator, q fitted to each sequence.

    The run is left unchanged.

    Args:
        data: packed data, or text that is packed here with the run's tokenizer; by default the held-out split of the
            run's own data.
        estimators: names from `ESTIMATORS`.
        samples: S, draws per sequence after the fit.
        fast_steps: T_fast; by default the recipe's ``evaluation.steps``.
        limit: only the first ``limit`` sequences.
        seed: random seed.
        block: tokens per block of the estimator ``causal``.
        normaliser: number of draws with which the constant of an unnormalised prior is estimated; figures that use the
            estimate are not bounds.
    """
    model = with_estimated_normaliser(run.model, normaliser) if normaliser else run.model
    inference = run.inference if fast_steps is None else replace(run.inference, steps=fast_steps)
    dataset = held_out(run) if data is None else load_text_or_pack(data, run.tokenizer, run.length)
    chosen = Subset(dataset, range(len(dataset))[:limit])
    batches = DataLoader(chosen, batch_size=BATCH, collate_fn=dataset.collate)
    console = Console(stderr=True)
    shown = track(batches, "scoring", console=console, transient=True, disable=not console.is_terminal)
    on_device = (batch.to(run.device) for batch in shown)
    return evaluate(model, run.guide, on_device, inference, estimators, samples, seed, block)


def with_estimated_normaliser(model: Any, samples: int, seed: int = 0) -> Any:
    """A copy of a model whose unnormalised prior has an estimate of log C, from ``samples`` draws; prints the estimate.

    The copy shares the decoder with the given model, which is left unchanged. Raises `UsageError` if the prior is
    normalised.
    """
    model = deepcopy(model, {id(model.decoder): model.decoder})
    priors = [part for part in model.modules() if hasattr(part, "estimate_normaliser")]
    if not priors:
        raise UsageError("This run's prior is normalised: there is nothing to estimate, leave --normaliser out.")
    with seeded(seed):
        for prior in priors:
            value, stderr = prior.estimate_normaliser(samples)
            text = f"log normaliser of {type(prior).__name__}: {value:.4f} ± {stderr:.4f} nats per sequence, estimated"
            Console(stderr=True).print(text)
    return model


def k_hat(run: Run, sequences: int, draws: int, seed: int = 0) -> Tensor:
    """Pareto k-hat of the first ``sequences`` held-out sequences, from ``draws`` draws of q after the fit: (B,)."""
    dataset = held_out(run)
    batch = dataset.collate([dataset[i] for i in range(min(sequences, len(dataset)))]).to(run.device)
    problem = fit_problem(run.model, run.guide, batch, run.inference, draws, (seed,))
    sizes = [min(TOGETHER, draws - done) for done in range(0, draws, TOGETHER)]
    with seeded(seed), torch.no_grad():
        parts = [log_weights(run.model, run.guide, problem.batch, problem.state.parameters, n) for n in sizes]
    return pareto_k(torch.cat(parts))


def held_out(run: Run) -> PackedDataset:
    """The held-out split of the data that the run was trained on; `UsageError` if they may not, or cannot, be read."""
    if not run.may_read_data:
        raise UsageError(
            f"The run names its own data, {run.data}, which are outside the current folder and are not read unasked: "
            f"give them or others with --data, or add --trust (in Python trust=True)."
        )
    if not is_pack(run.data):
        raise UsageError(f"The run's own data is no longer at {run.data}: give packed data or a text with --data.")
    return load_text_or_pack(run.data, run.tokenizer, run.length)
