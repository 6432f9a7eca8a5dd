"""glibc malloc tuning: freed heap memory is kept for the next training step instead of returned to the system."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, see mallopt(3)
_USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_LARGE = 32 << 20  # bytes; glibc maps blocks of this size by mmap, not from the heap

_keeping = False


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed heap memory; returns whether it does. For processes of our own, such as a command.

    By default glibc trims the heap at the end of every step, and the next step pays for zeroed pages: 6 to 10 % of its
    time at the widths that a CPU trains (docs/speed.md). Blocks of 32 MiB and more are still returned at once. Does
    nothing if the user has set glibc's own environment variables, or without glibc.
    """
    global _keeping
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _USER_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    _keeping = bool(mallopt(_TRIM_THRESHOLD, 1 << 30) and mallopt(_MMAP_THRESHOLD, _LARGE))
    return _keeping


def make_room(size: int) -> None:
    """Trims the heap that `keep_freed_memory` has kept, if a block of ``size`` bytes will not come from the heap."""
    if _keeping and size >= _LARGE:
        ctypes.CDLL(None).malloc_trim(0)
