"""`make_task` and `make_problems`: what a task draws as a pack, each row with its exact −log p(x).

Shapes: N sequences.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ltm_pyro.data.encode import encode_document, encode_prompt
from ltm_pyro.data.manifest import Manifest
from ltm_pyro.data.pack import check_fractions
from ltm_pyro.data.sequences import pack_sequences
from ltm_pyro.data.staging import check_out
from ltm_pyro.data.tasks import ProblemTask, Task
from ltm_pyro.data.tokenizer import train_tokenizer, vocabulary_size

BEST_WITHIN = "best_within_"  # and the reach: a label of every sequence
NOTHING, OPTIMUM = "knowing nothing", "optimum"
DIFFICULTY = "difficulty"  # a label of every problem
_ROWS = 4096  # sequences drawn together
_VOCABULARY, _TO_LEARN = 768, 4_000  # of problems: enough for every number below 100 and every word to be one token


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


def make_problems(
    task: ProblemTask,
    out: str | Path,
    sequences: int = 50_000,
    *,
    about: Mapping[str, Any] | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    seed: int = 0,
    force: bool = False,
) -> Manifest:
    """Draws ``sequences`` problems and packs them, each with its question as prompt and its label ``difficulty``.

    Equal problems are in one split. The harder ones, as many as ``test_fraction`` asks for, are the split ``harder``.
    −log p of question and answer together is each one's ``exact_nats``. The tokenizer is a byte-level BPE in which a
    number below 100 is one token, learned from problems of its own.
    """
    check_fractions(val_fraction, test_fraction)
    check_out(out, force)
    rng = np.random.default_rng(seed)
    drawn = task.sample(sequences, rng)
    harder = math.ceil(sequences * test_fraction) if task.harder > task.hardest else 0
    others = task.sample(_TO_LEARN, np.random.default_rng((seed, 1)))
    # a tokenizer learns from parts of what has no spaces; no token goes beyond a sign, so that they may stand apart
    apart = [re.sub(r"([^\w\s]+)", r"\n\1\n", x.prompt + x.completion) for x in others]
    numbers = [f"{n}\n{n} {n}\n" for n in range(100)] * 50  # so often that none is missing
    tokenizer = train_tokenizer([*apart, *numbers], _VOCABULARY)
    problems = [*drawn, *(task.sample(harder, rng, harder=True) if harder else [])]
    prompts = [encode_prompt(tokenizer, x.prompt) for x in problems]
    return pack_sequences(
        [[*prompt, *encode_document(tokenizer, x.completion)] for prompt, x in zip(prompts, problems, strict=True)],
        out,
        vocabulary_size(tokenizer),
        exact_nats=[x.nats for x in problems],
        prompts=[*map(len, prompts)],
        labels={DIFFICULTY: [x.difficulty for x in problems]},
        task=about,
        tokenizer=tokenizer,
        splits=[None] * len(drawn) + ["harder"] * harder,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        force=force,
    )


def _cost(nats_N: Float[np.ndarray, " N"], exact_N: Float[np.ndarray, " N"]) -> Cost:
    above_N, root = nats_N - exact_N, math.sqrt(len(exact_N))
    errors = (float(x.std(ddof=1)) / root if len(x) > 1 else math.nan for x in (nats_N, above_N))
    return Cost(float(nats_N.mean()), next(errors), float(above_N.mean()), next(errors))
