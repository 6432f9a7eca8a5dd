"""Memory that a training step frees is kept for the next one, instead of going back to the system and coming anew."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, see mallopt(3)
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_LARGE = 32 << 20  # bytes; blocks of this size never come from the heap

_keeping = False


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; returns whether it does. For processes that are ours, such as a command's.

    By default the end of the heap goes back at the end of every step, and the next one pays for zeroed pages: six to
    ten hundredths of its time at the widths that a CPU trains (docs/speed.md). Blocks of 32 MiB and more still go back
    at once. What the user says in glibc's own environment variables stays; elsewhere than under glibc nothing happens.
    """
    global _keeping
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN_CHOICE):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    _keeping = bool(mallopt(_TRIM_THRESHOLD, 1 << 30) and mallopt(_MMAP_THRESHOLD, _LARGE))
    return _keeping


def make_room(size: int) -> None:
    """Before a block of ``size`` bytes that the heap cannot hold: what `keep_freed_memory` has kept there goes back."""
    if _keeping and size >= _LARGE:
        ctypes.CDLL(None).malloc_trim(0)
