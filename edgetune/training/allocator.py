"""Tunes glibc's malloc for the large buffers of CPU training."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MOST = 2**31 - 1
# glibc's default limit on the number of mapped blocks.
_MAPPED_BLOCKS = 65536
_MAPPED_BYTES = 2**20


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GB of freed memory instead of returning it to the system at once.

    By default glibc maps every large buffer again, and the kernel clears its pages at first use; a training step makes
    thousands of them. Keeping freed memory cut a step on two cores from 2.8 s to 2.3 s. The cost is fragmentation: a
    training used 1.5 times the memory of its activations. Does nothing without glibc.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _MOST})


def give_back_freed_memory() -> None:
    """Return the memory that this process has freed, and all large blocks that it frees later, to the system.

    Does nothing without glibc.
    """
    libc = _set({_M_MMAP_MAX: _MAPPED_BLOCKS, _M_MMAP_THRESHOLD: _MAPPED_BYTES, _M_TRIM_THRESHOLD: _MAPPED_BYTES})
    if libc is not None:
        libc.malloc_trim(0)


def _set(options: dict[int, int]) -> ctypes.CDLL | None:
    """Set options of glibc's malloc; None without glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return None
    for option, value in options.items():
        libc.mallopt(option, value)
    return libc
