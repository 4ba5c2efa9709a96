"""What one step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from lightslim.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**20) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_the_system_need_not_zero_it_again():
    run = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    if before < 1000:
        pytest.skip("its pages are huge, or it is told not to have them back")
    assert after < before / 10
