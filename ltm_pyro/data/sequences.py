"""Sequences of a generator, one per row and with their exact −log p(x), as a pack like any other."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ltm_pyro.contracts import DocumentInfo, Part
from ltm_pyro.data.documents import check_label
from ltm_pyro.data.manifest import FORMAT, TOKENIZER, Label, LabelValues, Manifest, Shard, Split, write_manifest
from ltm_pyro.data.pack import SHARD_ROWS, SIDES, check_fractions, split_by_hash
from ltm_pyro.data.rows import NO_PROMPT, Rows
from ltm_pyro.data.shards import lengths_file, write_lengths, write_shard
from ltm_pyro.data.staging import staged
from ltm_pyro.data.tokenizer import number_tokenizer, token_bytes, token_dtype, tokenizer_hash, vocabulary_size
from ltm_pyro.errors import UsageError


def pack_sequences(
    sequences: Iterable[Sequence[int] | np.ndarray],
    out: str | Path,
    vocabulary: int,
    *,
    exact_nats: Sequence[float] | None = None,
    prompts: Sequence[int] | None = None,
    labels: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    task: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    splits: Sequence[str | None] | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    seed: int = 0,
    force: bool = False,
) -> Manifest:
    """Packs N sequences of numbers from 0 to ``vocabulary`` − 1, one per row, and returns the manifest.

    Nothing is appended to a sequence; the start token is ``vocabulary``, so that a model of these data has
    ``vocabulary`` + 1 tokens. Equal sequences are in one split. ``ltm evaluate`` prints ``exact_nats`` beside the
    estimators, as the same texts' exact figure.

    Args:
        exact_nats: −log p(x) of every sequence under its generator.
        prompts: how many tokens at the start of each sequence are its prompt.
        labels: by name, one value per sequence; None where it is missing.
        task: ``name`` and ``options`` of the generator, to be shown by `ltm data show`.
        tokenizer: of sequences that are text, with ``vocabulary`` tokens; by default the token n is the number n.
        splits: of each sequence, None where a hash decides.
    """
    tokenizer = tokenizer or number_tokenizer(vocabulary)
    found, bytes_V = [np.asarray(tokens) for tokens in sequences], token_bytes(tokenizer)
    labels = {
        name: [check_label(x, f"The label {name!r} has") for x in values] for name, values in (labels or {}).items()
    }
    if not found:
        raise UsageError("No sequence was given to pack: give at least one.")
    columns = {"exact_nats": exact_nats, "prompts": prompts, "splits": splits, **labels}
    if wrong := {name: len(x) for name, x in columns.items() if x is not None and len(x) != len(found)}:
        raise UsageError(f"There are {len(found)} sequences, but {wrong} values: give one value per sequence.")
    for number, tokens in enumerate(found):
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise UsageError(f"Sequence {number} is no list of at least one whole number.")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise UsageError(f"Sequence {number} has a token outside of 0 to {vocabulary - 1}.")
        if prompts is not None and not 0 <= prompts[number] < len(tokens):
            raise UsageError(
                f"Sequence {number} has {len(tokens)} tokens and a prompt of {prompts[number]}: leave one to score."
            )
    if exact_nats is not None and not all(map(math.isfinite, exact_nats)):
        raise UsageError("exact_nats has a value that is not finite: -log p(x) of a sequence that occurs is.")
    if unknown := {*(splits or ())} - {*SIDES, None}:
        raise UsageError(f"There is no split {min(map(str, unknown))!r}: choose from {', '.join(SIDES)}, or None.")
    check_fractions(val_fraction, test_fraction)
    digests_N = [hashlib.sha256(b"%d\n" % seed + x.astype("<i8").tobytes()).digest()[:8] for x in found]
    sides_N = np.array([SIDES[x] if x else 0 for x in splits or [None] * len(found)], np.uint8)
    free = np.flatnonzero(sides_N == 0)
    if len(free):
        hashes_N = np.frombuffer(b"".join(digests_N), ">u8").astype(np.uint64)
        sides_N[free] = split_by_hash(hashes_N[free], val_fraction, test_fraction)
    settings = {"sequences": hashlib.sha256(b"".join(digests_N)).hexdigest(), "seed": seed, "task": dict(task or {})}
    with staged(out, force, settings) as staging:
        (staging.folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")
        written = {}
        for name, side in SIDES.items():
            numbers = np.flatnonzero(sides_N == side).tolist()
            shards: list[Shard] = []
            for first in range(0, len(numbers), SHARD_ROWS):
                chosen = numbers[first : first + SHARD_ROWS]
                parts = []
                for n in chosen:
                    known = {key: values[n] for key, values in labels.items()}
                    exact = None if exact_nats is None else float(exact_nats[n])
                    parts.append(Part(n, 0, 0, DocumentInfo(f"sequence:{n}", labels=known, exact_nats=exact)))
                rows = Rows(
                    first=first,
                    tokens_M=np.concatenate([found[n] for n in chosen]).astype(token_dtype(tokenizer)),
                    lengths_N=np.array([len(found[n]) for n in chosen]),
                    bytes_N=np.array([int(bytes_V[found[n]].sum()) for n in chosen]),
                    prompts_N=np.array([NO_PROMPT if prompts is None else int(prompts[n]) for n in chosen]),
                    parts=[[part] for part in parts],
                )
                shards.append(write_shard(rows, staging.folder / f"{name}-{len(shards):06d}.tar"))
            if numbers:
                lengths_N = np.array([len(found[n]) for n in numbers])
                lengths = write_lengths(lengths_N, staging.folder / lengths_file(name))
                written[name] = Split.of(len(numbers), tuple(shards), lengths)
        kinds: dict[str, Label] = {}
        for name, values in labels.items():
            different = LabelValues()
            for value in values:
                different.add(value)
            kinds[name] = different.label() or Label(kind="number")
        manifest = Manifest(
            format=FORMAT,
            tokenizer_hash=tokenizer_hash(tokenizer),
            vocabulary=vocabulary_size(tokenizer),
            seq_len=max(map(len, found)),
            rows="documents",
            labels=kinds,
            prompts=0 if prompts is None else len(found),
            exact=exact_nats is not None,
            task=dict(task or {}),
            dropped=0,
            splits=written,
        )
        write_manifest(manifest, staging.folder)
    return manifest
