"""The Lightning data module: batches of a packed directory."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ltm_pyro.contracts import UsageError
from ltm_pyro.data import PackedDataset, read_manifest


class PackedData(pl.LightningDataModule):
    """Batches of a packed directory (``ltm data pack``).

    Args:
        directory: the packed data.
        batch_size: B, sequences per step.
        workers: processes that read ahead; 0 reads in the training process.
        seed: of the order.
    """

    def __init__(self, directory: str, batch_size: int = 32, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UsageError(f"`data` needs batch_size ≥ 1 and workers ≥ 0, got {batch_size} and {workers}.")
        self.directory, self.batch_size, self.workers, self.seed = directory, batch_size, workers, seed

    @property
    def sequences(self) -> int:
        """How many sequences there are to train on."""
        return read_manifest(self.directory).splits["train"].sequences

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches, in an order of each epoch's own."""
        dataset = PackedDataset.open(self.directory, "train")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=len(dataset) >= self.batch_size,
            num_workers=self.workers,
            collate_fn=dataset.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out sequence, in the order of the shards."""
        dataset = PackedDataset.open(self.directory, "val")
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=dataset.collate)
