"""How fast a pack can be read."""

import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader

from ltm_pyro.data.dataset import BatchDataset, PackedDataset
from ltm_pyro.utils.processes import end_with_parent


def reading_speed(
    place: str | Path, workers: int = 0, batch_size: int = 32, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Tokens of text per second over one epoch of training: shuffled, checked and in batches."""
    dataset = PackedDataset.open(place)
    order = dataset.sampler(batch_size)
    began = clock()
    batches = DataLoader(
        BatchDataset(dataset), batch_size=None, sampler=order, num_workers=workers, worker_init_fn=end_with_parent
    )
    tokens = sum(int(batch.tokens_B.sum()) for batch in batches)
    return tokens / (clock() - began)
