"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from distill.runtime.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(16 << 20).add_(1)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
if keep_freed_memory():
    print(before, faults())
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_blocks_are_cleared_by_the_kernel_once_and_not_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("no glibc")
    before, after = map(int, done.stdout.split())
    assert after < 0.3 * before
