"""A function of many items, computed in several processes that share the memory of this one."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ltm_pyro.errors import UsageError
from ltm_pyro.utils.console import Console
from ltm_pyro.utils.processes import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 64  # items for each process that are read at a time, so that many items need not be in memory


def all_cores(device: torch.device | str) -> int:
    """On a CPU, as many processes as torch may use threads (``OMP_NUM_THREADS``): for small matrices that is faster.

    1 on a machine with CUDA, where a process that has been forked cannot always compute gradients.
    """
    return 1 if torch.device(device).type != "cpu" or torch.cuda.is_available() else torch.get_num_threads()


def check_workers(workers: int, device: torch.device) -> None:
    """Raises `UsageError` for a number of processes that cannot share the work of a device."""
    most = max(64, 8 * (os.cpu_count() or 1))
    if not 1 <= workers <= most:
        raise UsageError(f"{workers} worker processes cannot share the work: give 1 to {most}.")
    if workers > 1 and device.type != "cpu":
        raise UsageError(f"{workers} worker processes cannot share {device}: give 1.")


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 1) -> Iterator[Result]:
    """``function`` of each item, in the order of the items.

    The processes are forked, so that nothing is copied to them; each has one thread and ends with this process.

    Args:
        workers: processes; with 1 everything is computed here.

    Raises:
        UsageError: a process was killed, or ``function`` has raised it.
    """
    if workers == 1:
        yield from map(function, items)
        return
    rest = iter(items)
    while block := [*islice(rest, AHEAD * workers)]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than there are cores
            loader: DataLoader[Any] = DataLoader(
                _Results(function, block),
                batch_size=None,
                num_workers=min(workers, len(block)),
                multiprocessing_context="fork",
                worker_init_fn=end_with_parent,
                generator=torch.Generator(),  # a loader draws a seed, by default from the generator of the caller
            )
            pickled = iter(loader)
        try:
            for content in pickled:
                result = pickle.loads(content)
                if isinstance(result, UsageError):
                    raise result
                yield result
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UsageError(
                "A worker process was killed, most often because the machine ran out of memory: give fewer workers."
            ) from None


def track_map(about: str, workers: int = 1, total: float | None = None) -> Callable[..., Iterable[Any]]:
    """`parallel_map` with a progress bar on a terminal, to be called with a function and items, as `map` is."""
    console = Console(stderr=True)
    shown: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
    return lambda function, items: track(parallel_map(function, items, workers), about, total, **shown)


class _Results(Dataset[bytes]):
    """The pickled results: a tensor would keep a file open, and take a share of /dev/shm, as long as it lives."""

    def __init__(self, function: Callable[[Item], Any], items: Sequence[Item]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> bytes:
        try:
            return pickle.dumps(self.function(self.items[index]))
        except UsageError as error:
            return pickle.dumps(error)
