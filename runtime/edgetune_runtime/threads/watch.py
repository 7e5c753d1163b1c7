"""A thread that looks, while steps are computed, whether one of them is to end before it is done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.05
"""How often a running step is looked at: within the 200 ms that a deadline may be missed by, and seldom enough to cost
the threads that compute nothing."""
_IDLE_LOOKS = 20
"""Looks without a running step before the thread sleeps until the next one."""

_Step = tuple[Callable[[], bool], Callable[[], None]]


class Watch:
    """Looks at running steps, and stops each that is over; one thread, started with the first step."""

    def __init__(self) -> None:
        self._running: dict[object, _Step] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def over(self, is_over: Callable[[], bool], stop: Callable[[], None]) -> Iterator[None]:
        """While it lasts, call `stop` at each look at which `is_over`."""
        key = object()
        self._running[key] = (is_over, stop)
        if not self._wake.is_set():
            self._start()
        try:
            yield
        finally:
            del self._running[key]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="edgetune-watch", daemon=True)
                self._thread.start()
            self._wake.set()

    def _look(self) -> None:
        idle = 0
        while True:
            self._wake.wait()
            time.sleep(LOOK_S)
            steps = list(self._running.values())
            for is_over, stop in steps:
                if is_over():
                    stop()
            idle = 0 if steps else idle + 1
            if idle > _IDLE_LOOKS:
                self._wake.clear()
                # A step that began just before would not be looked at.
                idle = 0
                if self._running:
                    self._wake.set()


WATCH = Watch()
"""The one of this process."""


def _begin_anew() -> None:
    """A forked process has no threads but the one that forked, and no steps."""
    WATCH.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
