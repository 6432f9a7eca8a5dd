"""A split by index: rows of tokens, their shards read on demand, and batches of them."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ltm_pyro.contracts import Batch, make_batch
from ltm_pyro.data.batch_sampler import MIXED
from ltm_pyro.data.documents import Document, read_documents
from ltm_pyro.data.manifest import FORMAT, TOKENIZER, Manifest, Shard, Split, is_pack, read_manifest
from ltm_pyro.data.remote import read_file
from ltm_pyro.data.rows import Row, Rows, pack_rows
from ltm_pyro.data.shards import read_shard
from ltm_pyro.data.tokenizer import end_of_text, load_tokenizer, tokenizer_hash, vocabulary_size
from ltm_pyro.errors import UsageError


class PackedDataset(Dataset[Row]):
    """N rows of T tokens (uint16 or uint32) by index, with their tokenizer and manifest.

    ``dataset[i]`` is a `Row`; a `torch.utils.data.DataLoader` takes ``collate_fn=dataset.collate``. A shard is read and
    checked when one of its rows is asked for; only the shards used last are kept in memory.

    Args:
        place: the pack's folder or address.
        manifest: of the pack.
        tokenizer: of the pack.
        split: ``"train"`` or ``"val"``.
        cache: a folder for copies of the shards of a remote pack.
    """

    def __init__(
        self, place: str | Path, manifest: Manifest, tokenizer: Tokenizer, split: str, cache: Path | None = None
    ) -> None:
        self.place, self.manifest, self.tokenizer, self.split = place, manifest, tokenizer, split
        self._cache, self._start_token = cache, end_of_text(tokenizer)
        self.shards: tuple[Shard, ...] = manifest.split(split, place).shards
        self._ends = [*accumulate(shard.sequences for shard in self.shards)]
        self._loaded: OrderedDict[int, Rows] = OrderedDict()  # by shard, the last used last

    @classmethod
    def open(cls, place: str | Path, split: str = "train", cache: Path | None = None) -> "PackedDataset":
        """One split of the pack at ``place``; raises `UsageError` if there is no pack or no such split."""
        return cls(place, *open_pack(place), split, cache)

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
        return read_shard(self.place, self.shards[number], self._cache)

    def ranges(self) -> list[range]:
        """The ids of each shard's rows."""
        return [range(end - shard.sequences, end) for end, shard in zip(self._ends, self.shards, strict=True)]

    def collate(self, rows: Sequence[Row]) -> Batch:
        """The batch of B ``rows``, with `END_OF_TEXT` as start token."""
        ids, tokens, lengths, sizes, _ = zip(*rows, strict=True)
        tokens_BT = torch.from_numpy(np.stack(tokens).astype(np.int64))
        return make_batch(tokens_BT, torch.tensor(lengths), self._start_token, torch.tensor(ids), torch.tensor(sizes))


class BatchDataset(Dataset[Batch]):
    """A `PackedDataset` indexed by lists of ids, as a `DistributedBatchSampler` gives them."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, ids: list[int]) -> Batch:
        """The batch of these rows."""
        return self._dataset.collate([self._dataset[i] for i in ids])


def open_pack(place: str | Path) -> tuple[Manifest, Tokenizer]:
    """Manifest and tokenizer of a pack; raises `UsageError` if they do not belong together."""
    manifest = read_manifest(place)
    tokenizer = load_tokenizer(f"{place}/{TOKENIZER}", read_file(place, TOKENIZER))
    known = (manifest.tokenizer_hash, manifest.vocabulary)
    if (tokenizer_hash(tokenizer), vocabulary_size(tokenizer)) != known:
        raise UsageError(f"{place}/{TOKENIZER} is not the tokenizer of its manifest; pack the text again.")
    return manifest, tokenizer


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    """The documents ``texts`` packed in memory, into the rows that `pack` makes; their ids are ``"text:0"``, …"""
    return _pack_documents([Document(f"text:{i}", text, "text") for i, text in enumerate(texts)], tokenizer, seq_len)


def load_text_or_pack(path: str | Path, tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    """The validation split of a pack, or text in files or a folder packed on the fly with ``tokenizer``.

    Raises `UsageError` if a pack has another tokenizer or sequences longer than ``seq_len``.
    """
    if not is_pack(path):
        return _pack_documents([*read_documents([path])], tokenizer, seq_len)
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
    return PackedDataset.open(path, "val")


class _InMemory(PackedDataset):
    """Rows in memory, without shards on disk."""

    def __init__(self, rows: Rows, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self._rows = rows
        super().__init__("", manifest, tokenizer, "val")

    def read_shard(self, number: int) -> Rows:
        return self._rows


def _pack_documents(documents: list[Document], tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
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
        dropped=0,
        splits={"val": Split.of(len(documents), (shard,))},
    )
    return _InMemory(rows, manifest, tokenizer)
