"""A split by index: rows of tokens, their shards read on demand, and batches of them.

Shapes: B sequences, T tokens, N rows.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ltm_pyro.contracts import Batch, make_batch
from ltm_pyro.data.batch_sampler import MIXED, DistributedBatchSampler, PaddedIds, TokenBudgetSampler
from ltm_pyro.data.documents import Document, Fields, read_documents
from ltm_pyro.data.manifest import FORMAT, LARGEST, TOKENIZER, Manifest, Shard, Split, is_pack, read_manifest
from ltm_pyro.data.remote import read_file
from ltm_pyro.data.rows import Row, Rows, pack_rows
from ltm_pyro.data.shards import read_lengths, read_shard
from ltm_pyro.data.tokenizer import end_of_text, load_tokenizer, token_bytes, tokenizer_hash, vocabulary_size
from ltm_pyro.errors import UsageError

Scored = Literal["all", "completion"]
Observed = Literal["all", "prompt"]


class PackedDataset(Dataset[Row]):
    """N rows of at most T tokens (uint16 or uint32) by index, with their tokenizer and manifest.

    ``dataset[i]`` is a `Row`; a `torch.utils.data.DataLoader` takes ``collate_fn=dataset.collate``. A shard is read and
    checked when one of its rows is asked for; only the shards used last are kept in memory.

    Args:
        place: the pack's folder or address.
        manifest: of the pack.
        tokenizer: of the pack.
        split: ``"train"``, ``"val"`` or ``"test"``.
        cache: a folder for copies of the shards of a remote pack.
        score: what is scored of a document that has a prompt: ``all`` of it, or its ``completion``.
        observe: what q is fitted to: ``all`` of the document, or its ``prompt``.
    """

    def __init__(
        self,
        place: str | Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        split: str,
        cache: Path | None = None,
        score: Scored = "all",
        observe: Observed = "all",
    ) -> None:
        self.place, self.manifest, self.tokenizer, self.split = place, manifest, tokenizer, split
        self.score, self.observe = score, observe
        for name, value, known in (("score", score, get_args(Scored)), ("observe", observe, get_args(Observed))):
            if value not in known:
                raise UsageError(f"{name} is {value!r}: choose from {', '.join(known)}.")
            if value != "all":
                manifest.need_documents(place, f"`{name}: {value}`")
                documents = manifest.dropped + sum(x.documents for x in manifest.splits.values())
                if manifest.prompts < documents:
                    raise UsageError(
                        f"{documents - manifest.prompts} of {documents} documents have no prompt, which `{name}: "
                        f'{value}` needs: give "prompt" and "completion" in every record.'
                    )
        part = manifest.split(split, place)
        if not score == observe == "all" and part.sequences > part.documents:
            where = f"the split {split} of the pack {place}" if str(place) else "the text"
            raise UsageError(
                f"{part.sequences - part.documents} rows of {where} are later pieces of documents longer than "
                f"{manifest.seq_len} tokens, and would know nothing of the prompt: pack with a larger --seq-len, or "
                f"leave these documents out."
            )
        self._cache, self._start_token = cache, end_of_text(tokenizer)
        self.shards: tuple[Shard, ...] = part.shards
        self._ends = [*accumulate(shard.sequences for shard in self.shards)]
        self._loaded: OrderedDict[int, Rows] = OrderedDict()  # by shard, the last used last

    @classmethod
    def open(
        cls,
        place: str | Path,
        split: str = "train",
        cache: Path | None = None,
        score: Scored = "all",
        observe: Observed = "all",
    ) -> "PackedDataset":
        """One split of the pack at ``place``; raises `UsageError` if there is no pack or no such split."""
        return cls(place, *open_pack(place), split, cache, score, observe)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """Row ``index``, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        rows = self._loaded.get(number)
        if rows is None:
            rows = self._loaded[number] = self.read_shard(number)
            while len(self._loaded) > MIXED + 1:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(number)
        return rows.row(index)

    def __iter__(self) -> Iterator[Row]:
        """All rows, in order."""
        return map(self.__getitem__, range(len(self)))

    def read_shard(self, number: int) -> Rows:
        """All rows of one shard."""
        shard = self.shards[number]
        return read_shard(self.place, self.manifest, shard, self._ends[number] - shard.sequences, self._cache)

    def ranges(self) -> list[range]:
        """The ids of each shard's rows."""
        return [range(end - shard.sequences, end) for end, shard in zip(self._ends, self.shards, strict=True)]

    def sampler(
        self,
        batch_size: int,
        tokens: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shards: Sequence[range] | None = None,
        lengths_N: Int[np.ndarray, " N"] | None = None,
    ) -> TokenBudgetSampler | DistributedBatchSampler:
        """The order of one rank's batches: documents with others of like length, or rows of a stream.

        Args:
            batch_size: B, sequences per step and rank; of documents, as many as would fill B rows of full length.
            tokens: the most tokens per step and rank, with padding, instead of ``batch_size``.
            rank, ranks, seed, shuffle: as for the samplers.
            shards: the ids of each shard that is read; all of them by default.
            lengths_N: the tokens of every row of the split, by default from their file.
        """
        longest, shards = self.manifest.seq_len, self.ranges() if shards is None else shards
        if self.manifest.rows == "documents":
            budget = batch_size * longest if tokens is None else tokens
            if lengths_N is None:
                lengths_N = read_lengths(self.place, self.split, self.manifest.splits[self.split], longest)
            return TokenBudgetSampler(shards, lengths_N, budget, longest, rank, ranks, seed, shuffle)
        size = batch_size if tokens is None else tokens // longest
        if size < 1:
            raise UsageError(f"`data.tokens` is {tokens}, fewer than one row of {longest} tokens: raise it.")
        size = size if shuffle else min(size, sum(map(len, shards)) // ranks)
        return DistributedBatchSampler(shards, size, rank, ranks, seed=seed, shuffle=shuffle)

    def collate(self, rows: Sequence[Row], length: int = 0) -> Batch:
        """The batch of B ``rows``, padded to the longest or to ``length``, with `END_OF_TEXT` as start token.

        A prompt that is not scored, or alone observed, is masked as `PackedDataset` was told.
        """
        length = max(length, *(len(row.tokens_T) for row in rows))
        if self.manifest.rows == "stream":
            length = self.manifest.seq_len
        tokens_BT = torch.full((len(rows), length), self._start_token)
        for tokens_T, row in zip(tokens_BT, rows, strict=True):
            tokens_T[: len(row.tokens_T)] = torch.from_numpy(row.tokens_T.astype(np.int64))
        lengths_B, ids_B, bytes_B = (
            torch.tensor(x) for x in zip(*((len(row.tokens_T), row.id, row.bytes) for row in rows), strict=True)
        )
        batch = make_batch(tokens_BT, lengths_B, self._start_token, ids_B, bytes_B)
        if all(row.parts for row in rows):
            batch = batch._replace(parts=tuple(row.parts for row in rows))
        if self.score == self.observe == "all":
            return batch
        prompt_BT = torch.arange(length) < torch.tensor([row.prompt for row in rows])[:, None]
        observed_BT = batch.mask_BT & prompt_BT if self.observe == "prompt" else batch.mask_BT
        if self.score == "completion":
            bytes_B = torch.tensor([int(self._bytes_V[row.tokens_T[row.prompt :]].sum()) for row in rows])
            batch = batch._replace(mask_BT=batch.mask_BT & ~prompt_BT, bytes_B=bytes_B)
        return batch._replace(observed_BT=observed_BT)

    @cached_property
    def _bytes_V(self) -> Int[np.ndarray, " V"]:
        return token_bytes(self.tokenizer)


class BatchDataset(Dataset[Batch]):
    """A `PackedDataset` indexed by the batches of a sampler: a list of ids, or ids and the length to pad to."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, wanted: list[int] | PaddedIds) -> Batch:
        """The batch of these rows."""
        ids, length = wanted if isinstance(wanted, PaddedIds) else (wanted, 0)
        return self._dataset.collate([self._dataset[i] for i in ids], length)


def open_pack(place: str | Path) -> tuple[Manifest, Tokenizer]:
    """Manifest and tokenizer of a pack; raises `UsageError` if they do not belong together."""
    manifest = read_manifest(place)
    tokenizer = load_tokenizer(f"{place}/{TOKENIZER}", read_file(place, TOKENIZER, LARGEST))
    known = (manifest.tokenizer_hash, manifest.vocabulary)
    if (tokenizer_hash(tokenizer), vocabulary_size(tokenizer)) != known:
        raise UsageError(f"{place}/{TOKENIZER} is not the tokenizer of its manifest; pack the text again.")
    return manifest, tokenizer


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    """The documents ``texts`` packed in memory, into the rows that `pack` makes; their ids are ``"text:0"``, …"""
    return _pack_documents([Document(f"text:{i}", text, "text") for i, text in enumerate(texts)], tokenizer, seq_len)


def load_text_or_pack(
    path: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    split: str = "val",
    score: Scored = "all",
    observe: Observed = "all",
) -> PackedDataset:
    """A split of a pack, or text in files or a folder packed on the fly with ``tokenizer``, all fields as labels.

    Raises `UsageError` if a pack has another tokenizer or sequences longer than ``seq_len``.
    """
    if not is_pack(path):
        return _pack_documents([*read_documents([path], Fields(labels=None))], tokenizer, seq_len, score, observe)
    manifest = read_manifest(path)
    expected = tokenizer_hash(tokenizer)
    if manifest.tokenizer_hash != expected:
        raise UsageError(
            f"pack {path} has another tokenizer ({manifest.tokenizer_hash[:12]}, {manifest.vocabulary} tokens) than the"
            f" model ({expected[:12]}, {vocabulary_size(tokenizer)} tokens); give the text itself, or pack it again"
            " with the model's tokenizer.json."
        )
    if manifest.seq_len > seq_len:
        raise UsageError(
            f"pack {path} has sequences of {manifest.seq_len} tokens, longer than the model's {seq_len}; "
            f"pack the text again with --seq-len {seq_len}."
        )
    return PackedDataset.open(path, split, score=score, observe=observe)


class _InMemory(PackedDataset):
    """Rows in memory, without shards on disk."""

    def __init__(
        self, rows: Rows, manifest: Manifest, tokenizer: Tokenizer, score: Scored = "all", observe: Observed = "all"
    ) -> None:
        self._rows = rows
        super().__init__("", manifest, tokenizer, "val", score=score, observe=observe)

    def read_shard(self, number: int) -> Rows:
        return self._rows


def _pack_documents(
    documents: list[Document],
    tokenizer: Tokenizer,
    seq_len: int,
    score: Scored = "all",
    observe: Observed = "all",
) -> PackedDataset:
    parts = [*pack_rows(documents, tokenizer, seq_len)]
    if not parts:
        raise UsageError("no text was given to pack; give at least one document.")
    rows = Rows.join(parts)
    tokens, size = int(rows.lengths_N.sum()), int(rows.bytes_N.sum())
    shard = Shard(file="", sha256="", size=0, sequences=len(rows), tokens=tokens, bytes=size)
    manifest = Manifest(
        format=FORMAT,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocabulary=vocabulary_size(tokenizer),
        seq_len=seq_len,
        rows="documents",
        prompts=sum(document.prompt is not None for document in documents),
        dropped=0,
        splits={"val": Split.of(len(documents), (shard,), lengths="")},
    )
    return _InMemory(rows, manifest, tokenizer, score, observe)
