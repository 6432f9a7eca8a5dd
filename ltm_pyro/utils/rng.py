"""Random number generation that depends on integers alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ltm_pyro.utils.threads import one_at_a_time


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seeds torch's generators with the integers ``seed``; their states are restored afterwards.

    They are process-wide: another thread waits here until the block ends.
    """
    with one_at_a_time, torch.random.fork_rng():
        torch.default_generator.manual_seed(mix(*seed))  # torch.manual_seed keeps a stack trace without a CUDA device
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(mix(*seed))
        yield


def mix(*seed: int) -> int:
    """One random seed of 63 bits from several integers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
