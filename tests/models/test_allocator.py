"""Large blocks that a process frees stay with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import mmap, resource, sys
import torch
from gossipml.models.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 << 20)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not keep_freed_memory():
    sys.exit(3)
faults()
print(faults() * mmap.PAGESIZE)
"""


def test_large_blocks_are_taken_from_the_kernel_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=60)
    if done.returncode == 3:
        pytest.skip("not the C library of GNU")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20, "of 320 MiB in all"
