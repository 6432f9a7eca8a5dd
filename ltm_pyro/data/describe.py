"""What one split of a pack contains: lengths of its documents, their sources, and a few sequences as text."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ltm_pyro.data.dataset import PackedDataset
from ltm_pyro.data.tokenizer import end_of_text


class Description(NamedTuple):
    """Counts of documents by length (``"64-127"`` tokens, …) and of sequences by source, and some sequences as text."""

    lengths: dict[str, int]
    sources: dict[str, int]
    samples: list[dict[str, Any]]


def describe(place: str | Path, split: str, samples: int, seed: int) -> Description:
    """Reads one split once; a sequence is counted for the source of every document that it has tokens of."""
    dataset = PackedDataset.open(place, split)
    end, before = end_of_text(dataset.tokenizer), -1
    lengths: Counter[int] = Counter()
    open_document, tokens = -1, 0  # whose pieces come now, and how long they are together
    sources: Counter[str] = Counter()
    for number in range(len(dataset.shards)):
        rows = dataset.read_shard(number)
        if dataset.manifest.rows == "stream":
            ends = np.flatnonzero(rows.tokens_M == end)
            lengths.update(np.diff(ends, prepend=before).tolist())
            before = before if not len(ends) else int(ends[-1])
            before -= len(rows.tokens_M)
        else:
            for (part,), size in zip(rows.parts, rows.lengths_N.tolist(), strict=True):
                if part.number != open_document:
                    lengths.update([tokens] * (tokens > 0))
                    open_document, tokens = part.number, 0
                tokens += size
        sources.update(source for parts in rows.parts for source in {part.document.source for part in parts})
    lengths.update([tokens] * (tokens > 0))
    chosen = np.random.default_rng(seed).choice(len(dataset), min(samples, len(dataset)), replace=False)
    return Description(_by_powers(lengths), dict(sources.most_common()), [_sample(dataset, int(i)) for i in chosen])


def _by_powers(lengths: Counter[int]) -> dict[str, int]:
    """The counts summed between powers of two."""
    spans: Counter[int] = Counter()
    for length, count in lengths.items():
        spans[length.bit_length()] += count
    return {f"{2 ** (k - 1)}-{2**k - 1}": spans[k] for k in range(min(spans), max(spans) + 1)}


def _sample(dataset: PackedDataset, index: int) -> dict[str, Any]:
    row = dataset[index]
    text = dataset.tokenizer.decode(row.tokens_T.tolist(), skip_special_tokens=False)
    documents = [part.document.id for part in row.parts]
    labels = dict(row.parts[0].document.labels) if dataset.manifest.rows == "documents" else {}
    offset = row.parts[0].offset if row.parts else None  # packs of format 2 do not know their documents
    return {
        **{"id": row.id, "documents": documents, "labels": labels},
        **{"offset": offset, "prompt": row.prompt, "text": text},
    }
