"""Freed memory is kept: later rounds of large allocations fault no pages in."""

import platform
import subprocess
import sys

import pytest

# A process of its own: the setting cannot be taken back.
SCRIPT = """
import resource, torch
from qanchor.train.allocator import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap needs a few rounds to find its shape.
rounds = [faults() for _ in range(8)]
print(rounds[0], rounds[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_once_got_is_not_asked_for_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    first, last = (int(word) for word in done.stdout.split())
    assert last < first / 4
