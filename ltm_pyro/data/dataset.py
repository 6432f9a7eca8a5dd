"""A split in memory: rows of tokens by index, and batches of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from ltm_pyro.contracts import Batch, UsageError, make_batch
from ltm_pyro.data.documents import Document, read_documents
from ltm_pyro.data.manifest import FORMAT, TOKENIZER, Manifest, Split, is_pack, read_manifest
from ltm_pyro.data.rows import Row, pack_rows
from ltm_pyro.data.shards import read_rows
from ltm_pyro.data.tokenizer import end_of_text, load_tokenizer, tokenizer_hash, vocabulary_size


class PackedDataset(Dataset[Row]):
    """N rows of T tokens in one array ``tokens_NT`` (uint16 or uint32), with the tokenizer and manifest they go with.

    ``dataset[i]`` is a `Row`; a `torch.utils.data.DataLoader` takes ``collate_fn=dataset.collate``.
    """

    def __init__(self, rows: Iterable[Row], manifest: Manifest, tokenizer: Tokenizer) -> None:
        _, tokens, lengths, sizes, documents = zip(*rows, strict=True)
        self.tokens_NT: UInt[np.ndarray, "N T"] = np.stack(tokens)
        self.lengths_N: Int[np.ndarray, " N"] = np.array(lengths)
        self.bytes_N: Int[np.ndarray, " N"] = np.array(sizes)
        self.documents: tuple[tuple[str, ...], ...] = documents
        self.manifest = manifest
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> "PackedDataset":
        """One split of the pack ``directory``; raises `UsageError` if it is no pack, damaged or has no such split."""
        manifest = read_manifest(directory)
        tokenizer = load_tokenizer(Path(directory) / TOKENIZER)
        if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
            raise UsageError(f"{directory}/{TOKENIZER} is not the tokenizer of its manifest; pack the text again.")
        return cls(read_rows(directory, split), manifest, tokenizer)

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> Row:
        """Row ``index``, counted from 0."""
        length, size = int(self.lengths_N[index]), int(self.bytes_N[index])
        return Row(index, self.tokens_NT[index], length, size, self.documents[index])

    def collate(self, rows: Sequence[Row]) -> Batch:
        """The batch of B ``rows``, behind `END_OF_TEXT` as start token."""
        ids, tokens, lengths, sizes, _ = zip(*rows, strict=True)
        tokens_BT = torch.from_numpy(np.stack(tokens).astype(np.int64))
        start = end_of_text(self.tokenizer)
        return make_batch(tokens_BT, torch.tensor(lengths), start, torch.tensor(ids), torch.tensor(sizes))


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    """Documents ``texts`` packed in memory, row for row as `pack` would; the ids are ``"text:0"``, ``"text:1"``…"""
    return _pack_documents([Document(f"text:{i}", text) for i, text in enumerate(texts)], tokenizer, seq_len)


def load_text_or_pack(path: str | Path, tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    """The validation split of a pack, or a text or JSONL file or folder packed on the fly with ``tokenizer``.

    A pack's tokenizer must be ``tokenizer`` and its sequences no longer than ``seq_len``, else `UsageError`.
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


def _pack_documents(documents: list[Document], tokenizer: Tokenizer, seq_len: int) -> PackedDataset:
    rows = [*pack_rows(documents, tokenizer, seq_len)]
    if not rows:
        raise UsageError("no text was given to pack; give at least one document.")
    split = Split(
        documents=len(documents),
        sequences=len(rows),
        tokens=sum(row.length for row in rows),
        bytes=sum(row.bytes for row in rows),
        shards=(),
    )
    manifest = Manifest(
        format=FORMAT,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocabulary=vocabulary_size(tokenizer),
        seq_len=seq_len,
        splits={"val": split},
    )
    return PackedDataset(rows, manifest, tokenizer)
