"""What one step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

WHERE = """
from pathlib import Path
import torch
from lightslim.memory import keep_freed_memory

{call}
address = torch.empty(20 * 2**20, dtype=torch.uint8).data_ptr()
(heap,) = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
start, end = (int(bound, 16) for bound in heap.split("-"))
print(start <= address < end)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
@pytest.mark.parametrize(("call", "expected"), [("", "False"), ("keep_freed_memory()", "True")])
def test_large_tensors_lie_on_the_heap_which_stays_and_not_in_pages_that_are_given_back(call, expected):
    command = [sys.executable, "-c", WHERE.format(call=call)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
