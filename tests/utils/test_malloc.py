"""What is freed stays in the process: counted in page faults, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

WORK = """
import resource, torch
from ltm_pyro.utils.malloc import keep_freed_memory
print(keep_freed_memory())
def step():
    return sum(x.shape[0] for x in [torch.ones(1 << 18) for _ in range(200)])
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

ROOM = """
import re, sys, torch
from ltm_pyro.utils.malloc import keep_freed_memory, make_room
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
keep_freed_memory()
blocks = [torch.ones(1 << 20) for _ in range(50)]
last = torch.ones(1 << 20)
del blocks
before = resident()
make_room(int(sys.argv[1]))
print("freed", before - resident())
"""


def run(*arguments, work=WORK, **environment):
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", work, *arguments]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


@glibc
def test_a_second_step_finds_the_memory_of_the_first():
    kept, faults = run()
    chosen, anew = run(MALLOC_TRIM_THRESHOLD_="131072")  # the user's choice: every block comes from the system
    assert (kept, chosen) == ("True", "False")
    assert int(faults) < int(anew) / 10


@glibc
def test_room_for_a_block_that_the_heap_cannot_hold_is_taken_from_it():
    assert int(run(str(1 << 25), work=ROOM)[1]) > 150_000  # kB of the 200 MB that are free
    assert int(run(str(1 << 24), work=ROOM)[1]) == 0
    assert int(run(str(1 << 25), work=ROOM, MALLOC_TRIM_THRESHOLD_="1073741824")[1]) == 0  # the user has chosen
