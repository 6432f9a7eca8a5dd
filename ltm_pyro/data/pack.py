"""`ltm data pack`: text to a folder of token shards with a manifest, a pure function of text and settings."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ltm_pyro.contracts import UsageError
from ltm_pyro.data.documents import Document, read_documents
from ltm_pyro.data.manifest import FORMAT, TOKENIZER, Manifest, Shard, Split, write_manifest
from ltm_pyro.data.rows import check_seq_len, pack_rows, text_pieces
from ltm_pyro.data.shards import write_shards
from ltm_pyro.data.staging import staged
from ltm_pyro.data.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size

SHARD_ROWS = 4096


def pack(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str = "bpe:4096",
    seq_len: int = 128,
    val_fraction: float = 0.02,
    seed: int = 0,
    force: bool = False,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Packs the documents of ``inputs`` (`read_documents`) into ``out`` and returns its manifest.

    A document is held out for validation when a hash of ``seed`` and its text falls below ``val_fraction``, so equal
    texts fall on the same side; of two different documents or more, at least one is on each side. ``tokenizer`` is
    ``"bpe:SIZE"``, trained on the training documents alone, or the path of a `tokenizer.json`. Each side is its
    documents, each followed by `END_OF_TEXT`, cut into rows of ``seq_len`` tokens. ``progress`` is called with the
    tokens of each shard written. Raises `UsageError`, and then leaves nothing behind; an existing pack is replaced
    only under ``force``, once the new one is complete.
    """
    spec = parse_tokenizer(tokenizer)
    check_seq_len(seq_len)
    with staged(out, force) as folder:
        corpus = _divide([*inputs], val_fraction, seed)
        bpe = train_tokenizer(corpus.training_text(), spec) if isinstance(spec, int) else load_tokenizer(spec)
        splits = {}
        for split, documents in corpus.counts.items():
            rows = pack_rows(corpus.documents(split), bpe, seq_len)
            splits[split] = _total(documents, _told(write_shards(rows, folder, split, shard_rows), progress))
        _check_length(splits["train"], seq_len)
        manifest = Manifest(
            format=FORMAT,
            tokenizer_hash=tokenizer_hash(bpe),
            vocabulary=vocabulary_size(bpe),
            seq_len=seq_len,
            splits=splits,
        )
        (folder / TOKENIZER).write_text(bpe.to_str(pretty=True), "utf-8")
        write_manifest(manifest, folder)
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """The documents of ``paths``, read again on every pass; those whose share lies below ``threshold`` are held out."""

    paths: list[str | Path]
    seed: int
    threshold: float
    counts: dict[str, int]

    def documents(self, split: str) -> Iterator[Document]:
        held_out = split == "val"
        for document in read_documents(self.paths):
            if (_share(document.text, self.seed) < self.threshold) == held_out:
                yield document

    def training_text(self) -> Iterator[str]:
        for document in self.documents("train"):
            yield from text_pieces(document.text)


def _divide(paths: list[str | Path], val_fraction: float, seed: int) -> _Corpus:
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction {val_fraction} leaves nothing to train on; give a number from 0 to below 1.")
    shares_N = np.fromiter((_share(document.text, seed) for document in read_documents(paths)), np.float64)
    if not len(shares_N):
        raise UsageError("no input was given; name a .txt or .jsonl file or a folder of them.")
    threshold = _threshold(shares_N, val_fraction)
    held_out = int((shares_N < threshold).sum())
    counts = {"train": len(shares_N) - held_out} | ({"val": held_out} if held_out else {})
    return _Corpus(paths=paths, seed=seed, threshold=threshold, counts=counts)


def _share(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the text and the seed."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _threshold(shares_N: Float[np.ndarray, " N"], val_fraction: float) -> float:
    """``val_fraction``, or the nearest number that leaves at least one text on each side."""
    lowest, highest = float(shares_N.min()), float(shares_N.max())
    if val_fraction == 0 or len(shares_N) == 1:
        return 0.0
    if lowest == highest:
        raise UsageError(
            f"all {len(shares_N)} documents are the same, so none can be held out; add others or set val_fraction 0."
        )
    return min(max(val_fraction, float(np.nextafter(lowest, 1))), highest)


def _told(shards: Iterable[Shard], progress: Callable[[int], None] | None) -> Iterator[Shard]:
    """``shards``, with ``progress`` told of each one's tokens."""
    for shard in shards:
        if progress:
            progress(shard.tokens)
        yield shard


def _total(documents: int, shards: Iterable[Shard]) -> Split:
    shards = tuple(shards)
    return Split(
        documents=documents,
        sequences=sum(shard.sequences for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )


def _check_length(train: Split, seq_len: int) -> None:
    if train.tokens < seq_len:
        raise UsageError(
            f"the training text has {train.tokens} tokens, fewer than one sequence of {seq_len}; "
            "add text or lower seq_len."
        )
