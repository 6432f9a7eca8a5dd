"""How fast a pack is read, when nothing else is done with it."""

import time
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader

from ltm_pyro.data.dataset import Batches, PackedDataset
from ltm_pyro.data.order import Order


def reading_speed(place: str | Path, batch_size: int = 32, workers: int = 1, batches: int | None = None) -> float:
    """Tokens per second of the training split: shuffled, checked and made into batches, as training gets them.

    Args:
        batches: how many to read; one epoch when not given.
    """
    dataset = PackedDataset.open(place)
    order = Order(dataset.ranges(), batch_size)
    loader = DataLoader(Batches(dataset), batch_size=None, sampler=order, num_workers=workers)
    began = time.perf_counter()
    tokens = sum(batch.inputs_BT.numel() for batch in islice(loader, batches))
    return tokens / (time.perf_counter() - began)
