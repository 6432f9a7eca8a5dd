"""One trial in a process of its own: if it runs out of memory, turns non-finite or crashes, no other trial ends."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search.definition import load_definition
from ltm_pyro.studies.search.objective import Setting
from ltm_pyro.studies.search.samplers import RUNGS
from ltm_pyro.utils.files import DISK_IS_FULL, DiskFullError, atomic_write
from ltm_pyro.utils.malloc import keep_freed_memory
from ltm_pyro.utils.processes import end_with_parent

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then forks before any tensor or device exists
CONTEXT.set_forkserver_preload(["ltm_pyro.utils.fork_server", __name__])
TICK = 0.5  # seconds between two reports of the progress
FULL = "the disk is full"
UNREACHABLE = {  # a disk or a network that is gone, whatever the setting
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "EROFS",
        "ENODEV",
        "ENOTCONN",
        "ETIMEDOUT",
        "EHOSTUNREACH",
        "ENETUNREACH",
        "EREMOTEIO",
    )
    if hasattr(errno, name)
}
FIGURES = "figures.json"  # in the folder of a run


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a trial's process receives: the study, the setting's fields, and what it may use.

    Args:
        threads: of one trial.
        device: the CUDA device it sees, None for all (unverified).
        memory_gib: the most memory it may allocate.
        objectives: how many there are; a report needs one.
        key: of everything that decides the figures; they are kept under it in the run's folder.
    """

    study: str
    setting: dict[str, Any]
    threads: int
    device: int | None = None
    memory_gib: float | None = None
    objectives: int = 1
    key: str = ""


def start_process(task: Task) -> tuple[Any, Connection]:
    """The running process, and the end of a pipe on which its messages arrive.

    They are ``("tick", progress)``, ``("report", rung, bound, by document)``, and at last ``("done", figures)``,
    ``("failed", reason)``, or ``("trouble", cause)`` if the machine, and not the setting, is why it failed.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(task, sender))
    process.start()
    sender.close()
    return process, receiver


def _run(task: Task, sender: Connection) -> None:
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with_parent()
    run = Path(task.setting["run"])
    outcome: tuple[str, Any]
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / "trial.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        outcome = "done", _objective(task, sender)
        with suppress(OSError, UsageError), atomic_write(run / FIGURES) as new:
            new.write_text(json.dumps({"key": task.key, "figures": outcome[1]}), "utf-8")
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
        cause = machine_trouble(error)
        outcome = ("trouble", cause) if cause else ("failed", failure_reason(error))
    with suppress(OSError):
        sys.stderr.flush()
    with suppress(FileNotFoundError):
        shutil.rmtree(run / "checkpoints")  # a study of large models would fill the disk
    sender.send(outcome)


def _objective(task: Task, sender: Connection) -> dict[str, float]:
    torch.set_num_threads(task.threads)
    if task.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(task.device)
    if task.memory_gib is not None:
        most = int(task.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    last = 0.0

    def tick(progress: float) -> None:
        nonlocal last
        if time.monotonic() - last > TICK:
            last = time.monotonic()
            sender.send(("tick", progress))

    def report(rung: int, bound: float, documents: Sequence[float] = ()) -> None:
        if task.objectives > 1:
            raise UsageError("`report` needs one objective, and this study has several: leave it out.")
        if isinstance(rung, bool) or not isinstance(rung, int) or not 0 <= rung < len(RUNGS):
            raise UsageError(
                f"`report` was given the rung {rung!r}: there are {', '.join(map(str, range(len(RUNGS))))}."
            )
        if not _is_number(bound) or not all(map(_is_number, documents)):
            raise UsageError(f"`report` was given {bound!r}: give a number.")
        sender.send(("report", rung, float(bound), [float(x) for x in documents]))

    figures = load_definition(task.study).objective(Setting(**task.setting, tick=tick, report=report))
    if not isinstance(figures, Mapping):
        raise UsageError(f"`objective` returned {figures!r}: let it return figures by name, such as {{'bound': 3.2}}.")
    if odd := next((name for name, x in figures.items() if not isinstance(name, str) or not _is_number(x)), None):
        raise UsageError(f"`objective` returned {odd!r}: {figures[odd]!r}, which is no number by a name.")
    return {name: float(value) for name, value in figures.items()}


def _is_number(x: Any) -> bool:
    try:
        float(x)
    except (TypeError, ValueError):
        return False
    return not isinstance(x, str | bytes)


def kept_figures(run: Path, key: str) -> dict[str, float] | None:
    """The figures that a trial has left in its folder, of which the storage has not heard."""
    try:
        found = json.loads((run / FIGURES).read_text("utf-8"))
        return {str(k): float(v) for k, v in found["figures"].items()} if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def machine_trouble(error: BaseException) -> str | None:
    """What of the machine made a trial fail; None if it was the trial itself."""
    if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_IS_FULL):
        return FULL
    if isinstance(error, OSError) and error.errno is not None and error.errno in UNREACHABLE:
        return os.strerror(error.errno)
    return None


def failure_reason(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"out of memory: {text[:200]}"
    name = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return f"{name}{text[:300]}"


def exit_reason(exitcode: int | None) -> str:
    """Why a process ended that sent no result."""
    if exitcode == -signal.SIGKILL:
        return "killed (SIGKILL): most often the machine ran out of memory"
    if exitcode is not None and exitcode < 0:
        return f"crashed ({signal.Signals(-exitcode).name})"
    return f"ended without a result (exit code {exitcode})"
