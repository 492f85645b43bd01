"""Large tensors of one step are those of the next: memory once got is kept."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let glibc keep freed memory of up to 2 GiB for the next allocation, process-wide.

    By default it hands large blocks back at once, and the kernel clears the same pages again in
    every step: a third of a CPU step of recipe `mini` (docs/log.md). Elsewhere than on glibc
    nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
