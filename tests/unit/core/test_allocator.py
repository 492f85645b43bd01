"""Freed memory is kept: large tensors come from the heap, not from a mapping of their own."""

import platform
import subprocess
import sys

import pytest

# A process of its own: the setting cannot be taken back.
SCRIPT = """
import ctypes
import torch
from qanchor.train.allocator import keep_freed_memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = MallInfo

def mappings_of_a_large_tensor():
    before = libc.mallinfo2().hblks
    tensor = torch.empty(64 << 20)
    return libc.mallinfo2().hblks - before

before = mappings_of_a_large_tensor()
keep_freed_memory()
print(before, mappings_of_a_large_tensor())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="counts mappings with glibc's mallinfo2; elsewhere keep_freed_memory does nothing",
)
def test_large_tensors_no_longer_get_a_mapping_that_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    before, after = (int(word) for word in done.stdout.split())
    assert (before, after) == (1, 0)
