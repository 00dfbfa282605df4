"""Freed memory is kept, where the C library can be told to."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from vitrail.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
import torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 2**18)  # 16 MiB: 4096 pages
        torch.ones(40, 2**18)  # 40 MiB: above what glibc itself comes to keep
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(word: str) -> int:
    """Pages that the system had to hand out for forty large tensors, one after the other."""
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the C library has no mallopt, or takes no such thresholds")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_large_tensors_cost_no_new_pages() -> None:
    kept = faults("keep")
    assert kept < 1_000
    assert faults("leave") > 10 * kept
