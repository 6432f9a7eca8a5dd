"""One trial in a process of its own: if it runs out of memory, turns non-finite or crashes, no other trial ends."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.errors import UsageError
from ltm_pyro.studies.search.definition import load_definition
from ltm_pyro.studies.search.objective import Setting
from ltm_pyro.utils.files import DISK_IS_FULL, DiskFullError
from ltm_pyro.utils.malloc import keep_freed_memory
from ltm_pyro.utils.processes import end_with_parent

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then forks before any tensor or device exists
CONTEXT.set_forkserver_preload(["ltm_pyro.utils.fork_server", __name__])
TICK = 0.5  # seconds between two reports of the progress


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a trial's process receives: the study, the setting's fields, and what it may use.

    Args:
        threads: of one trial.
        device: the CUDA device it sees, None for all (unverified).
        memory_gib: the most memory it may allocate.
    """

    study: str
    setting: dict[str, Any]
    threads: int
    device: int | None = None
    memory_gib: float | None = None


def start_process(task: Task) -> tuple[Any, Connection]:
    """The running process, and the end of a pipe on which its messages arrive.

    They are ``("tick", progress)``, ``("report", rung, bound)``, and at last ``("done", figures)``,
    ``("failed", reason)``, or ``("full", reason)`` if the disk was full.
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
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
        full = isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_IS_FULL)
        outcome = "full" if full else "failed", failure_reason(error)
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

    setting = Setting(**task.setting, tick=tick, report=lambda rung, bound: sender.send(("report", rung, bound)))
    figures = load_definition(task.study).objective(setting)
    return {name: float(value) for name, value in figures.items()}


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
