"""A thread of lower priority that all steps of a base are computed on, so that other processes go first."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from edgetune_runtime.errors import UsageError

T = TypeVar("T")

NORMAL = "normal"
PRIORITIES = (NORMAL, "low", "idle")
"""low is a nice value 10 higher and SCHED_BATCH, idle is SCHED_IDLE: for cores that nobody else wants; sched(7)."""
_NICER = 10


class ComputeThread:
    """Runs functions one after another on a thread of its own; threads that they start inherit its priority."""

    def __init__(self, priority: str) -> None:
        self._executor = ThreadPoolExecutor(1, "edgetune-compute", _lower, (priority,))

    def run(self, compute: Callable[[], T]) -> T:
        """What `compute` returns or raises."""
        future = self._executor.submit(compute)
        try:
            return future.result()
        except BaseException:
            # After Ctrl-C it still runs, and must not meet what comes next.
            wait([future])
            raise

    def close(self) -> None:
        """End the thread; no other call may follow."""
        self._executor.shutdown()


def compute_thread(priority: str) -> ComputeThread | None:
    """The thread for a priority; None for the normal one, as the caller's own thread computes then.

    UsageError for an unknown priority, and for others than normal where threads have none of their own.
    """
    if priority not in PRIORITIES:
        raise UsageError(f"no priority {priority!r}", f"choose one of: {', '.join(PRIORITIES)}")
    if priority == NORMAL:
        return None
    if sys.platform != "linux":
        raise UsageError(f"priority {priority!r} needs Linux", "leave it out, or lower that of the whole process")
    return ComputeThread(priority)


def _lower(priority: str) -> None:
    """Lower the priority of the calling thread; on Linux both calls mean a thread, not the process."""
    thread = threading.get_native_id()
    if priority == "low":
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
    os.sched_setscheduler(thread, os.SCHED_BATCH if priority == "low" else os.SCHED_IDLE, os.sched_param(0))
