"""`make_task`: the sequences of a task as a pack, each with its exact −log p(x) and the best within a reach.

Shapes: N sequences.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ltm_pyro.data.manifest import Manifest
from ltm_pyro.data.pack import check_fractions
from ltm_pyro.data.sequences import pack_sequences
from ltm_pyro.data.staging import check_out
from ltm_pyro.data.tasks import Task

BEST_WITHIN = "best_within_"  # and the reach: a label of every sequence
NOTHING, OPTIMUM = "knowing nothing", "optimum"
_ROWS = 4096  # sequences drawn together


class Cost(NamedTuple):
    """Nats per sequence of a prediction, and by how much it is above the optimum, each with its standard error."""

    nats: float
    stderr: float
    excess: float
    excess_stderr: float


class Made(NamedTuple):
    """A pack, and what the predictions cost on all of its sequences: by how much they know."""

    manifest: Manifest
    costs: dict[str, Cost]


def make_task(
    task: Task,
    out: str | Path,
    sequences: int = 50_000,
    reaches: Iterable[int] = (3, 7),
    *,
    about: Mapping[str, Any] | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    seed: int = 0,
    force: bool = False,
) -> Made:
    """Draws ``sequences`` of a task and packs them, one per row.

    −log p(x) is each sequence's ``exact_nats``, and the nats of the best prediction whose tokens see only the r before
    them, and their position, are its label ``best_within_r`` for each r of ``reaches``. Equal sequences are in one
    split.

    Args:
        about: ``name`` and ``options`` of the task, kept in the manifest to be shown.
        seed: of the sequences and the splits; what all sequences of a task share is an option of the task.
    """
    check_fractions(val_fraction, test_fraction)
    check_out(out, force)
    rng = np.random.default_rng(seed)
    blocks = [task.sample(min(_ROWS, sequences - n), rng) for n in range(0, sequences, _ROWS)]
    tokens_NT = np.concatenate(blocks)
    exact_N = task.sequence_nats(tokens_NT)
    within = {r: task.sequence_nats(tokens_NT, r) for r in sorted({*reaches})}
    columns = {NOTHING: task.sequence_nats(tokens_NT, 0)}
    columns |= {f"best within {r}": nats_N for r, nats_N in within.items()} | {OPTIMUM: exact_N}
    manifest = pack_sequences(
        tokens_NT,
        out,
        task.vocabulary,
        exact_nats=exact_N.tolist(),
        labels={f"{BEST_WITHIN}{r}": nats_N.tolist() for r, nats_N in within.items()},
        task=about,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        force=force,
    )
    return Made(manifest, {name: _cost(nats_N, exact_N) for name, nats_N in columns.items()})


def _cost(nats_N: Float[np.ndarray, " N"], exact_N: Float[np.ndarray, " N"]) -> Cost:
    above_N, root = nats_N - exact_N, math.sqrt(len(exact_N))
    errors = (float(x.std(ddof=1)) / root if len(x) > 1 else math.nan for x in (nats_N, above_N))
    return Cost(float(nats_N.mean()), next(errors), float(above_N.mean()), next(errors))
