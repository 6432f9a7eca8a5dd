"""What is freed stays in the process: counted in page faults, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

WORK = """
import resource, sys, torch
from ltm_pyro.allocator import keep_freed_memory
print(keep_freed_memory() if "keep" in sys.argv else "left alone")
def step():
    return sum(x.shape[0] for x in [torch.ones(1 << 18) for _ in range(200)])
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*arguments, **environment):
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", WORK, *arguments]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=120)
    kept, faults = done.stdout.split("\n")[:2]
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_second_step_finds_the_memory_of_the_first():
    _, default = run()
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < default / 10
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"  # the user has chosen
