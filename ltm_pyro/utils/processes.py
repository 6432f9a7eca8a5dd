"""Child processes that end with their parent, also if that was killed and could tell them nothing."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # Linux's name for it, see prctl(2)
STARTER = "LTM_STARTER"  # in the environment of a process: the number of the one that started it, and has to be alive
POLL = 0.5  # seconds between two looks at the parent, where nothing tells of its end


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


def end_with_starter() -> None:
    """`end_with_parent` for a process whose environment names its parent; it ends at once if that has gone already.

    To be called before the long imports, in which a parent can be killed as well.
    """
    starter = os.environ.pop(STARTER, None)
    if starter is not None:
        end_with_parent()
        if starter != str(os.getppid()):
            os._exit(1)
