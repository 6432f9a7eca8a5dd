"""How time and memory are measured: rounds in turn, medians and quartiles, the peak of a separate process."""

import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from ltm_pyro.utils.malloc import keep_freed_memory
from ltm_pyro.utils.processes import end_with_parent

Key = TypeVar("Key")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def compiler() -> str | None:
    """The C++ compiler that torch's would call; without one nothing is compiled."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)


class How(NamedTuple):
    """How often each call is timed, on which clock, and whether torch's compiler takes part."""

    rounds: int = 5
    clock: Literal["wall", "cpu"] = "wall"
    compiled: bool = False


def seconds(run: Callable[[], Any], how: How) -> float:
    """Time of one call."""
    now = CLOCKS[how.clock]
    start = now()
    run()
    return now() - start


def in_turn(runs: Mapping[Key, Callable[[], Any]], how: How) -> dict[Key, list[float]]:
    """Seconds of every call, one of each in every round, in random order; a first call does not count.

    A call that always followed the same one would always find the processor's caches in the same state.
    """
    for run in runs.values():
        run()
    times: dict[Key, list[float]] = {key: [] for key in runs}
    order = random.Random(0)
    for _ in range(how.rounds):
        for key in order.sample(list(runs), len(runs)):
            times[key].append(seconds(runs[key], how))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median, and its 95 % confidence interval by ranks."""
    ranked, reach = sorted(values), statistics.NormalDist().inv_cdf(0.975) * math.sqrt(len(values)) / 2
    low, high = math.floor(len(ranked) / 2 - reach), math.ceil(len(ranked) / 2 + reach)
    return {
        "median": statistics.median(ranked),
        "low": ranked[max(low, 0)],
        "high": ranked[min(high, len(ranked) - 1)],
    }


def peak_bytes(work: Callable[..., None], *arguments: Any) -> int:
    """By how much ``work`` raises the memory of a fresh process: weights, optimiser states and activations."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        return pool.submit(_growth, work, torch.get_num_threads(), arguments).result()


def _growth(work: Callable[..., None], threads: int, arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as every command does
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work(*arguments)
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def matrix_rate(precision: str, how: How, device: str = "cpu", size: int = 2048) -> float:
    """FLOP/s of the product of two square matrices, the best of ten: what this machine can do."""
    size = size if device == "cpu" else 4 * size
    a, b = (torch.randn(size, size, dtype=getattr(torch, precision), device=device) for _ in range(2))

    def run() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / min(in_turn({0: run}, how._replace(rounds=10))[0])


def machine() -> dict[str, Any]:
    """The machine and versions that the figures are of."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": name,
        "compiler": compiler() or "none found: compiled rows are not run",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # 1 per busy core; above the benchmark's own threads means other work
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
