"""What one step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from lightslim.memory import keep_freed_memory

def step():
    [torch.ones(400_000) for _ in range(12)]

keep_freed_memory()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_the_system_need_not_zero_it_again():
    run = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000, "of 46,900 pages; without the call most processes ask for all of them"
