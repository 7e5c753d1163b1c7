"""Confines this process before native code reads files of unknown origin: limits, no network, no root privileges.

What a system does not have, or does not allow, is left out: limits need Unix; the rest needs Linux.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.threads.machine import free_mb

from .child_process import MAX_S

_COPIES = 4
"""An engine may have a file twice while it repacks weights; the rest is for buffers that grow with it."""
_KV_BYTES = 4
"""Size of a number in keys and values: f32, the widest type of any engine."""
_SPARE_BYTES = 1_000_000_000
"""Memory of Python, the libraries, and allocations that are never used, such as most of the stacks of threads."""
_MIN_S = 60
_BYTES_PER_S = 1_000_000
"""Bytes per second of the slowest disk and processor, by which a larger bundle gets more time."""
_OPEN_FILES = 256
# Numbers of Linux: sched.h, prctl.h and capability.h.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 8, 38
_CAPABILITY_VERSION = 0x20080522
_DAC_READ_SEARCH = 1 << 2
_NOBODY = 65534
"""The account without rights of all distributions, and the kernel's own for unknown ones."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@dataclass(frozen=True)
class ProcessLimits:
    """What a process may allocate, without mapped files, how long it may take, and the size of files that it writes."""

    memory_bytes: int
    time_s: float
    file_bytes: int = 0


def limits_of(manifest: Manifest, context_length: int) -> ProcessLimits:
    """What opening a bundle and answering in one context takes at most; what grows with it, within the free memory."""
    file_bytes = sum(entry.bytes for entry in manifest.files.values())
    kv_bytes = _KV_BYTES * manifest.base.kv_values_per_token * context_length
    grows_bytes = _COPIES * (file_bytes + kv_bytes)
    free = free_mb()
    if free is not None:
        grows_bytes = min(grows_bytes, int(free * 1e6))
    return ProcessLimits(grows_bytes + _SPARE_BYTES, float(min(_MIN_S + file_bytes // _BYTES_PER_S, MAX_S)))


def confine(limits: ProcessLimits) -> None:
    """Confine this process for the rest of its life. Call it before there are other threads.

    It can then allocate no more memory than the limit, and compute for its time on each core. It has no network, and
    ends with the thread that started it. Root becomes `nobody` with the right to read all files, but stays root in a
    container that has no such right to give.
    """
    # numpy's threads would take memory, and an abort of llama.cpp would start a debugger.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # Where memory is short, the kernel ends this process first.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        if os.geteuid() == 0:
            libc.unshare(_CLONE_NEWNET)
            _become_nobody(libc)
        else:
            # Others than root need a user namespace for it, in which they have rights at first.
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
            _keep_rights(libc, 0)
        # After that, as a change of the account resets it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - Windows has none

        figures = {
            resource.RLIMIT_DATA: limits.memory_bytes,
            resource.RLIMIT_CPU: int(limits.time_s * (os.cpu_count() or 1)),
            resource.RLIMIT_NOFILE: _OPEN_FILES,
            resource.RLIMIT_FSIZE: limits.file_bytes,
            resource.RLIMIT_CORE: 0,
        }
        for name, limit in figures.items():
            _, hard_limit = resource.getrlimit(name)
            lowest = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
            with suppress(OSError, ValueError, OverflowError):
                resource.setrlimit(name, (lowest, lowest))


def _become_nobody(libc: ctypes.CDLL) -> None:
    rights = (_Capabilities * 2)()
    if libc.capget(ctypes.byref(_Header(_CAPABILITY_VERSION)), rights) or not rights[0].permitted & _DAC_READ_SEARCH:
        return
    libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    # A user namespace may lack this account.
    with suppress(OSError):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _keep_rights(libc, _DAC_READ_SEARCH)


def _keep_rights(libc: ctypes.CDLL, kept: int) -> None:
    """Give up all capabilities but those in the bits of `kept`."""
    rights = (_Capabilities * 2)(_Capabilities(kept, kept, 0))
    libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION)), rights)
