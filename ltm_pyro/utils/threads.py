"""One thread at a time in what is process-wide: Pyro's stack of handlers, its store, and torch's global generators."""

import os
import threading
from contextlib import ContextDecorator
from typing import Any


class _OneAtATime(ContextDecorator):
    """A re-entrant lock, to be used with ``with`` or as the decorator of a function."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def renew(self) -> None:
        """A lock that is free, for a forked child: the thread that held the old one is not in it."""
        self._lock = threading.RLock()


one_at_a_time = _OneAtATime()
os.register_at_fork(after_in_child=one_at_a_time.renew)
