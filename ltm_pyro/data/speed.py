"""How fast a pack is read, when nothing else is done with it."""

import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader

from ltm_pyro.data.batch_sampler import Order
from ltm_pyro.data.dataset import Batches, PackedDataset


def reading_speed(
    place: str | Path, workers: int = 0, batch_size: int = 32, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Tokens per second of one epoch of the training split: shuffled, checked, in batches, as training gets them."""
    dataset = PackedDataset.open(place)
    order = Order(dataset.ranges(), batch_size)
    began = clock()
    batches = DataLoader(Batches(dataset), batch_size=None, sampler=order, num_workers=workers)
    tokens = sum(batch.inputs_BT.numel() for batch in batches)
    return tokens / (clock() - began)
