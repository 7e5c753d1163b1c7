"""Sets the priority of compute threads: normal, low or idle."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import thread as executors
from typing import TypeVar

from edgetune_runtime.errors import UsageError

from .machine import MAX_THREADS

T = TypeVar("T")

NORMAL = "normal"
PRIORITIES = (NORMAL, "low", "idle")
"""low is a nice value 10 higher with SCHED_BATCH; idle is SCHED_IDLE, which uses only idle cores. See sched(7)."""
_NICER = 10


class ComputeThreads:
    """Runs functions on up to `max_threads` threads of its own; threads that they start inherit the priority."""

    def __init__(self, priority: str, max_threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_threads, "edgetune-compute", _lower, (priority,))

    def run(self, compute: Callable[[], T]) -> T:
        """Run `compute` on one of the threads; returns or raises what it does.

        At the exit of the interpreter, when executors take no more work, it runs on the caller's.
        """
        try:
            future = self._executor.submit(compute)
        except RuntimeError:
            if not executors._shutdown:
                raise
            return compute()
        try:
            return future.result()
        except BaseException:
            # After Ctrl-C it is still running: wait, so that it does not overlap with the next call.
            wait([future])
            raise

    def close(self) -> None:
        """End the threads; no other call may follow."""
        self._executor.shutdown()


def compute_threads(priority: str) -> ComputeThreads | None:
    """The threads for a priority; None for normal, where the callers' threads compute.

    UsageError for an unknown priority, and for low and idle outside Linux, where priorities are per process.
    """
    if priority not in PRIORITIES:
        raise UsageError(f"no priority {priority!r}", f"choose one of: {', '.join(PRIORITIES)}")
    if priority == NORMAL:
        return None
    if sys.platform != "linux":
        message = f"priority {priority!r} is supported on Linux only"
        raise UsageError(message, "leave it out, or lower the priority of the whole process")
    return ComputeThreads(priority, MAX_THREADS)


def _lower(priority: str) -> None:
    """Lower the priority of the calling thread, unless it is `normal`; on Linux both calls are for one thread only."""
    if priority == NORMAL:
        return
    thread = threading.get_native_id()
    if priority == "low":
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
    os.sched_setscheduler(thread, os.SCHED_BATCH if priority == "low" else os.SCHED_IDLE, os.sched_param(0))
