"""How fast a pack can be read."""

import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader

from ltm_pyro.data.batch_sampler import DistributedBatchSampler
from ltm_pyro.data.dataset import BatchDataset, PackedDataset
from ltm_pyro.utils.processes import end_with_parent


def reading_speed(
    place: str | Path, workers: int = 0, batch_size: int = 32, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Tokens per second over one epoch of the training split: shuffled, checked and in batches, as in training."""
    dataset = PackedDataset.open(place)
    order = DistributedBatchSampler(dataset.ranges(), batch_size)
    began = clock()
    batches = DataLoader(
        BatchDataset(dataset), batch_size=None, sampler=order, num_workers=workers, worker_init_fn=end_with_parent
    )
    tokens = sum(batch.inputs_BT.numel() for batch in batches)
    return tokens / (clock() - began)
