"""How the C library's `malloc` keeps memory that was freed."""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of glibc's options
LARGEST = 32 << 20  # bytes; glibc takes no more
KEPT = 1 << 28  # as good for a step as more, and a small machine has the rest back


def keep_freed_memory() -> bool:
    """A step of a convolutional network frees and takes large blocks again and again, which glibc by itself gives back
    to the kernel each time and gets empty, page by page. With two workers on two cores more than half of the time went
    there. Now up to `KEPT` bytes stay with the process. False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
