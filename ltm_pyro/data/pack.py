"""`ltm data pack`: text to a folder of token shards with a manifest, a pure function of text and settings."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from tokenizers import Tokenizer

from ltm_pyro.data.documents import Document, input_files, read_documents
from ltm_pyro.data.duplicates import repeats, signature
from ltm_pyro.data.encode import encode_documents, text_pieces
from ltm_pyro.data.manifest import FORMAT, TOKENIZER, Manifest, Shard, Split, write_manifest
from ltm_pyro.data.rows import Cutter, Rows, check_seq_len
from ltm_pyro.data.shards import write_shard
from ltm_pyro.data.staging import Staging, staged
from ltm_pyro.data.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write

SHARD_ROWS = 4096
SAMPLE = 2**27  # bytes of text that a tokenizer learns from; more does not improve its vocabulary
Progress = Callable[[int], None]
_SIDES = {"train": 1, "val": 2}  # 0: dropped


def pack(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str = "bpe:4096",
    seq_len: int = 128,
    val_fraction: float = 0.02,
    seed: int = 0,
    drop_duplicates: Literal["exact", "near"] | None = None,
    force: bool = False,
    shard_rows: int = SHARD_ROWS,
    progress: Progress | None = None,
) -> Manifest:
    """Packs the documents of ``inputs`` (`read_documents`) into ``out`` and returns its manifest.

    A document is held out for validation if a hash of ``seed`` and its text is below ``val_fraction``, so equal texts
    are in the same split; with two or more different documents, each split has at least one. With ``drop_duplicates``
    only the first of several ``exact`` or ``near`` duplicates is kept (`signature`), so that none is in both splits.
    ``tokenizer`` is ``"bpe:SIZE"``, trained on a sample of the training documents, or the path of a `tokenizer.json`.
    The documents of a split, each followed by `END_OF_TEXT`, are cut into rows of ``seq_len`` tokens.

    Memory grows by a few bytes per document only. ``progress`` is called with the number of tokens of each finished
    shard. After an interruption the same call continues after the last finished shard and gives the same files. If it
    raises `UsageError`, nothing is left on disk; an existing pack is replaced only with ``force``, once the new one is
    complete.
    """
    inputs, spec = [*inputs], parse_tokenizer(tokenizer)
    check_seq_len(seq_len)
    settings = {
        "format": FORMAT,
        "inputs": [_fingerprint(given) for given in inputs],
        "tokenizer": spec if isinstance(spec, int) else tokenizer_hash(load_tokenizer(spec)),
        **{"seq_len": seq_len, "val_fraction": val_fraction, "seed": seed, "shard_rows": shard_rows},
        "drop_duplicates": drop_duplicates,
    }
    with staged(out, force, settings) as staging:
        corpus = _survey(inputs, val_fraction, seed, drop_duplicates)
        bpe = _tokenizer(staging.folder / TOKENIZER, spec, corpus)
        splits = _Writer(corpus, bpe, staging, seq_len, shard_rows, progress).write()
        _check_length(splits["train"], seq_len)
        manifest = Manifest(
            format=FORMAT,
            tokenizer_hash=tokenizer_hash(bpe),
            vocabulary=vocabulary_size(bpe),
            seq_len=seq_len,
            dropped=int((corpus.sides_N == 0).sum()),
            splits=splits,
        )
        write_manifest(manifest, staging.folder)
    return manifest


def _fingerprint(given: str | Path) -> list[Any]:
    """Identifies an input when a pack is resumed: path, size and modification time of every file."""
    stats = [(str(file.resolve()), file.stat()) for file, _ in input_files(given)]
    return [str(given), *([path, stat.st_size, stat.st_mtime_ns] for path, stat in stats)]


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """The documents of ``inputs``, read again on every pass, and how each is used.

    ``sides_N`` is the split of a document (0 if it is dropped), ``sampled_N`` whether the tokenizer learns from it.
    """

    inputs: list[str | Path]
    sides_N: UInt8[np.ndarray, " N"]
    sampled_N: np.ndarray

    def count(self, split: str) -> int:
        return int((self.sides_N == _SIDES[split]).sum())

    def documents(self) -> Iterator[tuple[int, Document]]:
        number = -1
        for number, document in enumerate(read_documents(self.inputs)):
            if number == len(self.sides_N):
                break
            yield number, document
        if number != len(self.sides_N) - 1:
            raise UsageError("the input has changed while it was packed; pack it again once it is complete.")

    def training_text(self) -> Iterator[str]:
        for number, document in self.documents():
            if self.sampled_N[number]:
                yield from text_pieces(document.text)


def _survey(
    inputs: list[str | Path], val_fraction: float, seed: int, drop_duplicates: Literal["exact", "near"] | None
) -> _Corpus:
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction {val_fraction} leaves nothing to train on; give a number from 0 to below 1.")
    digests, sizes, marks = bytearray(), bytearray(), bytearray()
    for document in read_documents(inputs):
        digest = hashlib.sha256(f"{seed}\n{document.text}".encode()).digest()[:8]
        digests += digest
        sizes += len(document.text).to_bytes(4, "little")
        if drop_duplicates:
            marks += digest if drop_duplicates == "exact" else signature(document.text).tobytes()
    if not digests:
        raise UsageError("no input was given; name a .txt, .jsonl or .parquet file or a folder of them.")
    digests_N = np.frombuffer(bytes(digests), ">u8").astype(np.uint64)
    marks_NB = np.frombuffer(bytes(marks), np.uint64).reshape(len(digests_N), -1)
    kept_N = ~repeats(marks_NB)
    shares_N = (digests_N >> np.uint64(16)) / 2**48
    held_out_N = shares_N < _threshold(shares_N[kept_N], val_fraction)
    sides_N = np.where(kept_N, np.where(held_out_N, _SIDES["val"], _SIDES["train"]), 0).astype(np.uint8)
    sizes_N = np.where(sides_N == _SIDES["train"], np.frombuffer(bytes(sizes), np.uint32), 0)
    chance = SAMPLE / max(int(sizes_N.sum(dtype=np.int64)), 1)
    sampled_N = (sizes_N > 0) & ((digests_N & np.uint64(2**16 - 1)) < chance * 2**16)
    return _Corpus(inputs=inputs, sides_N=sides_N, sampled_N=sampled_N)


def _threshold(shares_N: Float[np.ndarray, " N"], val_fraction: float) -> float:
    """``val_fraction``, or the nearest number with at least one text in each split."""
    lowest, highest = float(shares_N.min()), float(shares_N.max())
    if val_fraction == 0 or len(shares_N) == 1:
        return 0.0
    if lowest == highest:
        raise UsageError(
            f"all {len(shares_N)} documents are the same, so none can be held out; add others or set val_fraction 0."
        )
    return min(max(val_fraction, float(np.nextafter(lowest, 1))), highest)


def _tokenizer(path: Path, spec: int | Path, corpus: _Corpus) -> Tokenizer:
    """The pack's tokenizer: trained or loaded, or the one that an interrupted pack has written to ``path``."""
    if path.exists():
        return load_tokenizer(path)
    tokenizer = train_tokenizer(corpus.training_text(), spec) if isinstance(spec, int) else load_tokenizer(spec)
    with atomic_write(path) as new:
        new.write_text(tokenizer.to_str(pretty=True), "utf-8")
    return tokenizer


class _Writer:
    """Writes the shards of both splits in one pass over the text, after those that are finished already."""

    def __init__(
        self,
        corpus: _Corpus,
        tokenizer: Tokenizer,
        staging: Staging,
        seq_len: int,
        shard_rows: int,
        progress: Progress | None,
    ) -> None:
        self._corpus, self._tokenizer, self._staging, self._progress = corpus, tokenizer, staging, progress
        self._shards: dict[str, list[Shard]] = {split: [] for split in _SIDES}
        positions = dict.fromkeys(_SIDES, (0, 0))
        for entry in staging.entries:
            self._finished(entry["split"], Shard(**entry["shard"]))
            positions[entry["split"]] = tuple(entry["position"])
        rows = {split: sum(shard.sequences for shard in shards) for split, shards in self._shards.items()}
        self._cutters = {s: Cutter(tokenizer, seq_len, shard_rows, positions[s], rows[s]) for s in _SIDES}

    def write(self) -> dict[str, Split]:
        """Writes the missing shards; the split "val" exists only if it has documents."""
        sides = {side: split for split, side in _SIDES.items()}
        for piece in encode_documents(self._unwritten(), self._tokenizer):
            split = sides[int(self._corpus.sides_N[piece.number])]
            self._add(split, self._cutters[split].add(piece))
        for split, cutter in self._cutters.items():
            self._add(split, cutter.finish())
        counts = {split: self._corpus.count(split) for split in _SIDES}
        return {split: Split.of(n, tuple(self._shards[split])) for split, n in counts.items() if n}

    def _unwritten(self) -> Iterator[tuple[int, Document]]:
        first = np.zeros(1 + len(_SIDES), int)  # document by side
        for split, side in _SIDES.items():
            first[side] = self._cutters[split].position[0]
        for number, document in self._corpus.documents():
            side = self._corpus.sides_N[number]
            if side and number >= first[side]:
                yield number, document

    def _add(self, split: str, parts: Iterator[Rows]) -> None:
        for rows in parts:
            path = self._staging.folder / f"{split}-{len(self._shards[split]):06d}.tar"
            shard = write_shard(rows, path)
            self._staging.add({"split": split, "shard": shard.__dict__, "position": self._cutters[split].position})
            self._finished(split, shard)

    def _finished(self, split: str, shard: Shard) -> None:
        self._shards[split].append(shard)
        if self._progress:
            self._progress(shard.tokens)


def _check_length(train: Split, seq_len: int) -> None:
    if train.tokens < seq_len:
        raise UsageError(
            f"the training text has {train.tokens} tokens, fewer than one sequence of {seq_len}; "
            "add text or lower seq_len."
        )
