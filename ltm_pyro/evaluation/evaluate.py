"""Evaluation of one run on one data set.

Shapes: B sequences.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.contracts import Batch
from ltm_pyro.data import PackedDataset, load_text_or_pack
from ltm_pyro.data.dataset import Observed, Scored
from ltm_pyro.data.encode import batches_of_like_length
from ltm_pyro.data.manifest import is_pack, read_manifest
from ltm_pyro.errors import UsageError
from ltm_pyro.inference.ais import Annealing
from ltm_pyro.inference.elbo import log_weights
from ltm_pyro.inference.estimators import DEFAULT, evaluate, fit_problem
from ltm_pyro.inference.factor_prior import FactorPrior
from ltm_pyro.inference.global_latents import fix_global_draws
from ltm_pyro.inference.latent_sites import prior_factors
from ltm_pyro.inference.param_store import no_param_store
from ltm_pyro.inference.pareto import pareto_k
from ltm_pyro.inference.scores import Evaluation
from ltm_pyro.runs.run import Run
from ltm_pyro.training.run_directory import RECIPE
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.parallel import check_workers, track_map
from ltm_pyro.utils.rng import seeded
from ltm_pyro.utils.threads import one_at_a_time

BATCH = 32  # sequences of full length fitted together
WINDOW = 2048  # sequences of which those of like length are fitted together


@seeded(0)
def evaluate_run(
    run: Run,
    data: str | None = None,
    estimators: Sequence[str] = DEFAULT,
    samples: int | Sequence[int] = 16,
    fast_steps: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    block: int = 16,
    normaliser: int | None = None,
    temperatures: int = 32,
    split: str = "val",
    score: Scored | None = None,
    observe: Observed | None = None,
    starts: int | None = None,
    workers: int = 1,
) -> Evaluation:
    """The nats, perplexity and bits per byte of a data set under every estimator, q fitted to each sequence.

    The run is left unchanged.

    Args:
        data: packed data, or text that is packed here with the run's tokenizer; by default the held-out split of the
            run's own data.
        estimators: names from `ESTIMATORS`.
        samples: S, draws per sequence after the fit; of several numbers the largest, and a curve over all of them.
        fast_steps: T_fast; by default the recipe's ``evaluation.steps``.
        limit: only the first ``limit`` sequences; the last document may then be cut (`Evaluation.cut`).
        seed: random seed.
        block: tokens per block of ``causal`` and ``causal_prior``; `coarse_block` costs less.
        normaliser: number of draws with which the constant of an unnormalised prior is estimated; figures that use the
            estimate are not bounds.
        temperatures: K, the number of distributions between q and the posterior for the estimator ``ais``.
        split: of packed data.
        score: what is scored of a document with a prompt: ``all`` of it, or its ``completion``; by default of the run's
            own data what training scored, of others ``all``.
        observe: what q is fitted to: ``all`` of the document, or its ``prompt``; by default as for ``score``.
        starts: fits of q per sequence, of which the best is kept; by default the recipe's ``evaluation.starts``.
        workers: processes on a CPU that share the batches, forked from this one (`all_cores` says how many); the
            figures do not depend on it.
    """
    check_workers(workers, run.device)
    score, observe = scored_and_observed(run, data, score, observe)
    model = with_estimated_normaliser(run.model, normaliser) if normaliser else run.model
    inference = run.inference if fast_steps is None else replace(run.inference, steps=fast_steps)
    inference = inference if starts is None else replace(inference, starts=starts)
    if data is not None and split != "val" and not is_pack(data):
        raise UsageError(f"{data} is text, which has no split {split}: leave --split out, or pack the text.")
    if data is None:
        dataset = held_out(run, split, score, observe)
    else:
        dataset = load_text_or_pack(data, run.tokenizer, run.length, split, score, observe)
    chosen, order = range(len(dataset))[:limit], list[int]()
    batches = batches_of(dataset, chosen, order)
    on_device = (batch.to(run.device) for batch in batches)
    shown = track_map("scoring", workers, len(chosen) / BATCH)
    annealing = Annealing(temperatures=temperatures)
    some = len(chosen) < len(dataset) and dataset.manifest.rows == "documents"
    cut = some and bool(dataset[len(chosen)].parts[0].piece)  # the first row that is left out is a later piece
    found = evaluate(model, run.guide, on_device, inference, estimators, samples, seed, block, annealing, shown)
    rows = found.rows and found.rows.select(torch.tensor(order).argsort())
    return replace(found, cut=cut, rows=rows)


def batches_of(dataset: PackedDataset, chosen: range, order: list[int] | None = None) -> Iterator[Batch]:
    """Batches of like length of the chosen rows: of 32 rows of full length, or of shorter ones of as many tokens.

    Args:
        order: is given the rows' indices in the order of the batches, which is that of the data only `WINDOW` by
            `WINDOW`: so few shards are read at a time.
    """
    longest = dataset.manifest.seq_len
    for first in range(0, len(chosen), WINDOW):
        rows = [dataset[index] for index in chosen[first : first + WINDOW]]
        for indices in batches_of_like_length([len(row.tokens_T) for row in rows], BATCH, longest):
            if order is not None:
                order.extend(first + index for index in indices)
            yield dataset.collate([rows[index] for index in indices])


def scored_and_observed(
    run: Run, data: str | None, score: Scored | None, observe: Observed | None
) -> tuple[Scored, Observed]:
    """What is scored and observed where it is not said: of the run's own data as in training, of others ``all``."""
    trained: tuple[Scored, Observed] = (run.score, run.observe) if data is None else ("all", "all")
    return score or trained[0], observe or trained[1]


def coarse_block(run: Run) -> int:
    """A quarter of a row, at most 64 tokens: where the predictive gain is one figure of many, a few fits are enough.

    Texts that are no longer than that have nothing before their only block, and no gain.
    """
    return max(1, min(64, run.length // 4))


@one_at_a_time
def with_estimated_normaliser(model: Any, samples: int, seed: int = 0) -> Any:
    """A copy of a model whose unnormalised prior has an estimate of log C, from ``samples`` draws; prints the estimate.

    The copy shares the decoder with the given model, which is left unchanged. Raises `UsageError` if the prior is
    normalised.
    """
    model = deepcopy(model, {id(model.decoder): model.decoder})
    with seeded(seed), torch.no_grad(), no_param_store(model):
        if prior_factors(model):
            model.prior = FactorPrior(model.prior)
    priors = [part for part in model.modules() if hasattr(part, "estimate_normaliser")]
    if not priors:
        raise UsageError("This run's prior is normalised: there is nothing to estimate, leave --normaliser out.")
    with seeded(seed):
        for prior in priors:
            value, stderr = prior.estimate_normaliser(samples)
            text = f"log normaliser of {type(prior).__name__}: {value:.4f} ± {stderr:.4f} nats per sequence, estimated"
            Console(stderr=True).print(text)
    return model


@seeded(0)
def k_hat(run: Run, sequences: int, draws: int, seed: int = 0) -> Tensor:
    """Pareto k-hat of the first ``sequences`` held-out sequences, from ``draws`` draws of q after the fit: (B,)."""
    dataset = held_out(run)
    batch = dataset.collate([dataset[i] for i in range(min(sequences, len(dataset)))]).to(run.device)
    problem = fit_problem(run.model, run.guide, batch, run.inference, draws, seed)
    with fix_global_draws(run.model, seed), torch.no_grad():
        parts = [log_weights(*problem.fitted, x.particles, x.noise) for x in problem.draws("k-hat")]
    return pareto_k(torch.cat(parts))


def held_out(run: Run, split: str = "val", score: Scored = "all", observe: Observed = "all") -> PackedDataset:
    """A held-out split of the data that the run was trained on; `UsageError` if they may not, or cannot, be read."""
    if not run.may_read_data:
        raise UsageError(
            f"The run names its own data, {run.data}, which are outside the current folder and are not read unasked: "
            f"give them or others with --data, or add --trust (in Python trust=True)."
        )
    if not is_pack(run.data):
        raise UsageError(f"The run's own data is no longer at {run.data}: give packed data or a text with --data.")
    return load_text_or_pack(run.data, run.tokenizer, run.length, split, score, observe)


TEST_USES = "test-uses.jsonl"  # in a run's folder


def record_test_use(run: Path, data: str) -> int:
    """Notes in a run's folder that the test split of a pack was scored; returns how often it was, 0 if unknown.

    Args:
        run: its folder, or one of its checkpoints.
        data: the pack, which is told from others by the digest of its manifest.
    """
    folder = next((place for place in (run, *run.parents) if (place / RECIPE).is_file()), run.parent)
    use = {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "data": str(data), "digest": read_manifest(data).digest}
    with suppress(OSError), (folder / TEST_USES).open("a+", encoding="utf-8") as file:  # a run may not be writable
        file.write("\n" + json.dumps(use) + "\n")  # on a line of its own, even if the last one was cut
        file.seek(0)
        return file.read().count(f'"digest": "{use["digest"]}"')
    return 0
