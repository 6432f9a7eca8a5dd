"""`ltm data pack`: text to a folder of token shards with a manifest, a pure function of text and settings."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8, UInt64
from tokenizers import Tokenizer

from ltm_pyro.data.documents import Document, Fields, input_files, left_out, read_documents
from ltm_pyro.data.duplicates import groups, mix_bits, repeats, signature
from ltm_pyro.data.encode import encode_documents, text_pieces
from ltm_pyro.data.manifest import (
    FORMAT,
    MOST_VALUES,
    SPLITS,
    TOKENIZER,
    Label,
    LabelValues,
    Layout,
    Manifest,
    Shard,
    Split,
    write_manifest,
)
from ltm_pyro.data.rows import Cutter, Rows, check_seq_len
from ltm_pyro.data.shards import lengths_file, write_lengths, write_shard
from ltm_pyro.data.staging import Staging, staged
from ltm_pyro.data.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size
from ltm_pyro.errors import UsageError
from ltm_pyro.utils.files import atomic_write

SHARD_ROWS = 4096
SAMPLE = 2**27  # bytes of text that a tokenizer learns from; more does not improve its vocabulary
Progress = Callable[[int], None]
SIDES = {name: side for side, name in enumerate(SPLITS, start=1)}  # as `split_by_hash` numbers them; 0: dropped


def pack(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str = "bpe:4096",
    seq_len: int = 128,
    rows: Layout = "documents",
    labels: Iterable[str] = (),
    id: str | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    seed: int = 0,
    drop_duplicates: Literal["exact", "near"] | None = None,
    keep_together: Literal["exact", "near"] = "near",
    force: bool = False,
    shard_rows: int = SHARD_ROWS,
    progress: Progress | None = None,
) -> Manifest:
    """Packs the documents of ``inputs`` (`read_documents`) into ``out`` and returns its manifest.

    A row is one document, followed by `END_OF_TEXT`, or a piece of ``seq_len`` tokens of a longer one; with ``rows``
    ``"stream"`` the documents of a split are one sequence that is cut into rows of ``seq_len`` tokens. A document keeps
    its id (``file:line``, or the field ``id``), the fields ``labels`` and the length of its prompt.

    Documents that are equal or similar (``keep_together``, `groups`) are in the same split, which a hash of ``seed``
    and their texts decides: test below ``test_fraction`` from the top, val below ``val_fraction`` from the bottom.
    With as many groups as splits, each split has at least one. With ``drop_duplicates`` only the first of several
    ``exact`` or ``near`` duplicates is kept. ``tokenizer`` is ``"bpe:SIZE"``, trained on a sample of the training
    documents, or the path of a `tokenizer.json`.

    Memory grows by a few bytes per document only (128 more to find similar ones). ``progress`` is called with the
    number of tokens of each finished shard. After an interruption the same call continues after the last finished shard
    and gives the same files. If it raises `UsageError`, nothing is left on disk; an existing pack is replaced only with
    ``force``, once the new one is complete.
    """
    inputs, spec, labels = [*inputs], parse_tokenizer(tokenizer), tuple(dict.fromkeys(labels))
    check_seq_len(seq_len)
    settings = {
        "format": FORMAT,
        "inputs": [_fingerprint(given) for given in inputs],
        "tokenizer": spec if isinstance(spec, int) else tokenizer_hash(load_tokenizer(spec)),
        **{"seq_len": seq_len, "rows": rows, "labels": [*labels], "id": id, "seed": seed},
        **{"val_fraction": val_fraction, "test_fraction": test_fraction, "shard_rows": shard_rows},
        **{"drop_duplicates": drop_duplicates, "keep_together": keep_together},
    }
    with staged(out, force, settings) as staging:
        corpus = _survey(inputs, Fields(id, labels), val_fraction, test_fraction, seed, drop_duplicates, keep_together)
        bpe = _tokenizer(staging.folder / TOKENIZER, spec, corpus)
        splits = _Writer(corpus, bpe, staging, seq_len, rows, shard_rows, progress).write()
        _check_length(splits["train"], seq_len, rows)
        manifest = Manifest(
            format=FORMAT,
            tokenizer_hash=tokenizer_hash(bpe),
            vocabulary=vocabulary_size(bpe),
            seq_len=seq_len,
            rows=rows,
            labels=corpus.labels,
            prompts=corpus.prompts,
            dropped=int((corpus.sides_N == 0).sum()),
            splits=splits,
        )
        write_manifest(manifest, staging.folder)
    if open_ended := [name for name, label in corpus.labels.items() if label.kind == "text"]:
        warnings.warn(
            f"the label {open_ended[0]!r} has more than {MOST_VALUES:,} different values, or too long ones: every "
            f"document keeps its own, but the manifest does not list them",
            stacklevel=2,
        )
    wanted = {"val": val_fraction, "test": test_fraction}
    if empty := [
        name for name, fraction in wanted.items() if fraction and name not in splits and len(corpus.sides_N) > 2
    ]:
        warnings.warn(
            f"no document is in {' and in '.join(empty)}: there are too few groups of documents that are not similar",
            stacklevel=2,
        )
    if skipped := [f"{given}/{name}" for given in inputs for name in left_out(given)]:
        names = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        warnings.warn(f"left out, because neither name nor content says that they are data: {names}", stacklevel=2)
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
    fields: Fields
    labels: dict[str, Label]
    prompts: int
    sides_N: UInt8[np.ndarray, " N"]
    sampled_N: np.ndarray

    def count(self, split: str) -> int:
        return int((self.sides_N == SIDES[split]).sum())

    def documents(self) -> Iterator[tuple[int, Document]]:
        number = -1
        for number, document in enumerate(read_documents(self.inputs, self.fields)):
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
    inputs: list[str | Path],
    fields: Fields,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    drop_duplicates: Literal["exact", "near"] | None,
    keep_together: Literal["exact", "near"],
) -> _Corpus:
    """Reads all documents once, and decides what becomes of each."""
    check_fractions(val_fraction, test_fraction)
    digests, sizes, marks, ids = bytearray(), bytearray(), bytearray(), bytearray()
    values = {name: LabelValues() for name in fields.labels or ()}
    needs_marks, prompts = "near" in (drop_duplicates, keep_together), 0
    for document in read_documents(inputs, fields):
        digests += hashlib.sha256(f"{seed}\n{document.text}".encode()).digest()[:8]
        sizes += len(document.text).to_bytes(4, "little")
        prompts += document.prompt is not None
        if needs_marks:
            marks += signature(document.text).tobytes()
        if fields.id:
            ids += hashlib.sha256(json.dumps(document.id).encode()).digest()[:8]
        for name, value in document.labels.items():
            values[name].add(value)
    if not digests:
        raise UsageError("no input was given; name a .txt, .jsonl or .parquet file or a folder of them.")
    labels = {name: label for name, found in values.items() if (label := found.label())}
    if nowhere := [name for name in values if name not in labels]:
        raise UsageError(f"no document has the label {nowhere[0]!r}; name a field of the records, or leave it out.")
    digests_N = np.frombuffer(bytes(digests), ">u8").astype(np.uint64)
    exact_N1, near_NB = digests_N[:, None], np.frombuffer(bytes(marks), np.uint64).reshape(len(digests_N), -1)
    kept_N = np.ones(len(digests_N), bool)
    if drop_duplicates:
        kept_N = ~repeats(near_NB if drop_duplicates == "near" else exact_N1)
    if fields.id:
        number_K = np.flatnonzero(kept_N)
        repeated_K = repeats(np.frombuffer(bytes(ids), np.uint64)[kept_N][:, None])
        if repeated_K.any():
            at = number_K[repeated_K.argmax()]
            twice = next(x.id for n, x in enumerate(read_documents(inputs, fields)) if n == at)
            raise UsageError(
                f"two documents have the id {twice!r} under {fields.id!r}; name a field that differs, or drop equal "
                f"documents with --drop-duplicates exact."
            )
    group_N = groups(near_NB if keep_together == "near" else exact_N1)
    sides_N = np.zeros(len(digests_N), np.uint8)
    sides_N[kept_N] = split_by_hash(_group_digests(digests_N, group_N)[kept_N], val_fraction, test_fraction)
    sizes_N = np.where(sides_N == SIDES["train"], np.frombuffer(bytes(sizes), np.uint32), 0)
    chance = SAMPLE / max(int(sizes_N.sum(dtype=np.int64)), 1)
    sampled_N = (sizes_N > 0) & ((digests_N & np.uint64(2**16 - 1)) < chance * 2**16)
    return _Corpus(
        inputs=inputs,
        fields=fields,
        labels=labels,
        prompts=prompts,
        sides_N=sides_N,
        sampled_N=sampled_N,
    )


def _group_digests(digests_N: UInt64[np.ndarray, " N"], group_N: Int[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """One digest per group, whatever the order of its members and, unlike their lowest, whatever their number."""
    lowest_N, highest_N = np.full(len(digests_N), 2**64 - 1, np.uint64), np.zeros(len(digests_N), np.uint64)
    np.minimum.at(lowest_N, group_N, digests_N)
    np.maximum.at(highest_N, group_N, digests_N)
    low_N, high_N = lowest_N[group_N], highest_N[group_N]
    return np.where(low_N == high_N, low_N, mix_bits(mix_bits(low_N)))


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raises `UsageError` unless something is left to train on."""
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{name} {fraction} leaves nothing to train on; give a number from 0 to below 1.")
    if val_fraction + test_fraction >= 1:
        raise UsageError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on; their sum has "
            f"to be below 1."
        )


def split_by_hash(
    digests_N: UInt64[np.ndarray, " N"], val_fraction: float, test_fraction: float
) -> UInt8[np.ndarray, " N"]:
    """The split of each document (`SIDES`): of all hashes the lowest are val, and the highest test.

    Equal hashes are in one split. The bounds move to the nearest hash where a split would have none; a test split
    takes a third hash.
    """
    shares_N = (digests_N >> np.uint64(16)) / 2**48
    groups = np.unique(shares_N)
    if val_fraction and len(shares_N) > 1 and len(groups) == 1:
        raise UsageError(
            f"all {len(shares_N)} documents are the same or similar, so none can be held out; add others, keep only "
            f"equal ones together (--keep-together exact), or set val_fraction and test_fraction to 0."
        )
    val = int((groups < val_fraction).sum())
    test = int((groups >= 1 - test_fraction).sum()) if test_fraction else 0
    if val_fraction and len(groups) > 1:
        val = min(max(val, 1), len(groups) - 1)
    if test_fraction and len(groups) > 2:
        test = min(max(test, 1), len(groups) - 1 - val)
    val, test = (val, min(test, len(groups) - val - 1)) if len(groups) > 1 else (0, 0)
    rank_N = np.searchsorted(groups, shares_N)
    low_N, high_N = rank_N < val, rank_N >= len(groups) - test
    return np.select([low_N, high_N], [SIDES["val"], SIDES["test"]], SIDES["train"]).astype(np.uint8)


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
        layout: Layout,
        shard_rows: int,
        progress: Progress | None,
    ) -> None:
        self._corpus, self._tokenizer, self._staging, self._progress = corpus, tokenizer, staging, progress
        self._shards: dict[str, list[Shard]] = {split: [] for split in SIDES}
        self._lengths: dict[str, list[int]] = {split: [] for split in SIDES}
        self._layout = layout
        positions = dict.fromkeys(SIDES, (0, 0))
        for entry in staging.entries:
            self._finished(entry["split"], Shard(**entry["shard"]), entry["lengths"])
            positions[entry["split"]] = tuple(entry["position"])
        rows = {split: sum(shard.sequences for shard in shards) for split, shards in self._shards.items()}
        self._cutters = {s: Cutter(tokenizer, seq_len, shard_rows, positions[s], rows[s], layout) for s in SIDES}

    def write(self) -> dict[str, Split]:
        """Writes the missing shards; the splits "val" and "test" exist only if they have documents."""
        sides = {side: split for split, side in SIDES.items()}
        for piece in encode_documents(self._unwritten(), self._tokenizer):
            split = sides[int(self._corpus.sides_N[piece.number])]
            self._add(split, self._cutters[split].add(piece))
        for split, cutter in self._cutters.items():
            self._add(split, cutter.finish())
        splits = {}
        for split in SIDES:
            if documents := self._corpus.count(split):
                path, lengths_N = self._staging.folder / lengths_file(split), np.array(self._lengths[split])
                lengths = write_lengths(lengths_N, path) if self._layout == "documents" else None
                splits[split] = Split.of(documents, tuple(self._shards[split]), lengths)
        return splits

    def _unwritten(self) -> Iterator[tuple[int, Document]]:
        first = np.zeros(1 + len(SIDES), int)  # document by side
        for split, side in SIDES.items():
            first[side] = self._cutters[split].position[0]
        for number, document in self._corpus.documents():
            side = self._corpus.sides_N[number]
            if side and number >= first[side]:
                yield number, document

    def _add(self, split: str, parts: Iterator[Rows]) -> None:
        for rows in parts:
            path = self._staging.folder / f"{split}-{len(self._shards[split]):06d}.tar"
            shard = write_shard(rows, path)
            lengths = rows.lengths_N.tolist() if self._layout == "documents" else []
            position = self._cutters[split].position
            self._staging.add({"split": split, "shard": shard.__dict__, "position": position, "lengths": lengths})
            self._finished(split, shard, lengths)

    def _finished(self, split: str, shard: Shard, lengths: list[int]) -> None:
        self._shards[split].append(shard)
        self._lengths[split] += lengths
        if self._progress:
            self._progress(shard.tokens)


def _check_length(train: Split, seq_len: int, rows: Layout) -> None:
    if rows == "stream" and train.tokens < seq_len:
        raise UsageError(
            f"the training text has {train.tokens} tokens, fewer than one sequence of {seq_len}; "
            "add text or lower seq_len."
        )
