"""Child processes that end with their parent, also if that was killed and could tell them nothing."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType

from ltm_pyro.errors import UsageError

_PR_SET_PDEATHSIG = 1  # Linux's name for it, see prctl(2)
STARTER = "LTM_STARTER"  # in the environment of a process: its `starter`, which has to be alive
POLL = 0.5  # seconds between two looks at the parent, where nothing tells of its end


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine has been stopped (SIGSTOP, Ctrl-Z); False where there is no /proc to ask."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] == "T"
    return False


@contextmanager
def signals_as_before() -> Iterator[None]:
    """What a library does about SIGINT and SIGTERM inside ends with the block: Lightning leaves a handler behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by a program in C, which alone can set it again
                signal.signal(number, handler)


@contextmanager
def _at_interruption(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, Ctrl-C is handled so, unless something else than Python's own handler is in charge of it."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler or getattr(before, "__module__", "") == __name__
    if not (in_main and ours):
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, before)


def end_at_interruption(said: str) -> AbstractContextManager[None]:
    """Inside, Ctrl-C ends the process at once: for imports, in which an exception is swallowed, or aborts a library."""

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, said.encode())
        os._exit(130)

    return _at_interruption(end)


@contextmanager
def swallowed_interruptions() -> Iterator[None]:
    """What fails after Ctrl-C inside ends as a KeyboardInterrupt: a late import may swallow it, and fail afterwards."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    try:
        with _at_interruption(note):
            yield
    except UsageError:
        raise
    except Exception as error:
        if seen:
            raise KeyboardInterrupt from error
        raise


def end_with_parent(worker: int = 0) -> None:
    """Ends this process as soon as its parent is gone. To be called by the child, first of all.

    Linux kills it at the parent's end; elsewhere, and for a child of multiprocessing's fork server, whose parent in the
    system is that server, a thread waits for the process that has started it.

    Args:
        worker: not used; a `torch.utils.data.DataLoader` passes its number, and takes this function as
            ``worker_init_fn``.
    """
    parent, starter = os.getppid(), multiprocessing.parent_process()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before the call
            os._exit(1)
        if starter is None or starter.pid == parent:
            return

    def watch() -> None:
        if starter is not None:
            starter.join()
        else:
            while os.getppid() == parent:
                time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def starter(patience: float) -> str:
    """This process as the value of `STARTER`: the others end if it is stopped for ``patience`` seconds."""
    return f"{os.getpid()} {patience}"


def end_with_starter() -> None:
    """`end_with_parent` for a process whose environment names its parent; it ends at once if that has gone already.

    It also ends, with a sentence, if its parent is stopped for too long. To be called before the long imports, in which
    a parent can be killed and stopped as well.
    """
    given = os.environ.pop(STARTER, None)
    if given is None:
        return
    parent, patience = given.split()
    end_with_parent()
    if parent != str(os.getppid()):
        os._exit(1)

    def watch() -> None:
        stopped = 0.0  # seconds in which this process has run: Ctrl-Z stops both
        while stopped < float(patience):
            time.sleep(POLL)
            stopped = stopped + POLL if is_stopped(int(parent)) else 0.0
        say = f"Process {parent}, which has started this one, has been stopped: see what it said, and start again."
        print(f"ltm: {say}", file=sys.stderr, flush=True)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
