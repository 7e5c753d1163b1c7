"""Sets how the C library's allocator treats the large buffers of a training on the CPU."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MOST = 2**31 - 1
# glibc's own limit of mapped blocks.
_MAPPED_BLOCKS = 65536
_MAPPED_BYTES = 2**20


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 2 GB, instead of giving it back to the system at once.

    glibc maps each large buffer anew and the kernel clears it page by page at first use; a training step makes
    thousands of them. Without that a step on two cores took 2.3 s instead of 2.8 s. But the blocks that are kept do not
    fit what comes next: a training took 1.5 times what its activations do. Does nothing without glibc.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _MOST})


def give_back_freed_memory() -> None:
    """Give what this process has freed, and all large blocks that it frees from now on, back to the system.

    Does nothing without glibc.
    """
    libc = _set({_M_MMAP_MAX: _MAPPED_BLOCKS, _M_MMAP_THRESHOLD: _MAPPED_BYTES, _M_TRIM_THRESHOLD: _MAPPED_BYTES})
    if libc is not None:
        libc.malloc_trim(0)


def _set(options: dict[int, int]) -> ctypes.CDLL | None:
    """Set options of glibc's malloc; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return None
    for option, value in options.items():
        libc.mallopt(option, value)
    return libc
