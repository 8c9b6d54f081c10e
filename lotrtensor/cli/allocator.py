"""The C library's allocator, told to keep freed memory for what is allocated next.

Left alone, glibc hands blocks of some MB back to the system as soon as they are free, and every new
one is then filled with zeros a page at a time: of `lotr verify` on an adapter of 8 B that was half
of the processor time.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT, _LARGE = 2**28, 2**25
"""Bytes that are kept at most, and the longest blocks that are: glibc takes no more than 32 MiB."""


def keep_freed_memory() -> None:
    """Set both thresholds where the C library has them; elsewhere nothing changes."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _LARGE)
