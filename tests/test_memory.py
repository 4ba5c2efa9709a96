"""What one step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

WHERE = """
from pathlib import Path
import torch
{call}
address = torch.empty(20 * 2**20, dtype=torch.uint8).data_ptr()
(heap,) = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
start, end = (int(bound, 16) for bound in heap.split("-"))
print(start <= address < end)
"""


CALLS = [
    "from lightslim.kernels import fake_quant; fake_quant(torch.ones(2), torch.tensor(1.0))",
    "from lightslim.kernels import fake_quant_many; fake_quant_many([torch.ones(2, 2)])",
    "from lightslim.prune import sensitivity; from lightslim.testing import TinyModule, tiny_loaders; "
    "sensitivity(TinyModule(), tiny_loaders()[1], 'val_loss', [0.5], mode='min')",
]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
@pytest.mark.parametrize(("call", "expected"), [("", "False"), *((call, "True") for call in CALLS)])
def test_large_tensors_lie_on_the_heap_which_stays_and_not_in_pages_that_are_given_back(call, expected):
    command = [sys.executable, "-c", WHERE.format(call=call)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
