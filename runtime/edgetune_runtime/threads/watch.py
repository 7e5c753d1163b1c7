"""A watcher thread that stops running steps before they are done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 0.05
"""How often running steps are checked: a deadline may be missed by as much, and a check must not slow down the compute
threads."""
_IDLE_POLLS = 20
"""Checks without a running step before the thread sleeps until the next one."""

_Step = tuple[Callable[[], bool], Callable[[], None]]


class Watch:
    """Checks running steps and stops those that should stop; one thread, started with the first step."""

    def __init__(self) -> None:
        self._running: dict[object, _Step] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watching(self, should_stop: Callable[[], bool], stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, call `stop` at each check where `should_stop` is true."""
        key = object()
        try:
            self._running[key] = (should_stop, stop)
            if not self._wake.is_set():
                self._start()
            yield
        finally:
            self._running.pop(key, None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._poll, name="edgetune-watch", daemon=True)
                thread.start()
                self._thread = thread
            self._wake.set()

    def _poll(self) -> None:
        idle = 0
        while True:
            self._wake.wait()
            time.sleep(POLL_S)
            steps = list(self._running.values())
            for should_stop, stop in steps:
                if should_stop():
                    stop()
            idle = 0 if steps else idle + 1
            if idle > _IDLE_POLLS:
                self._wake.clear()
                # A step that started just before the clear would not be checked.
                idle = 0
                if self._running:
                    self._wake.set()


WATCH = Watch()
"""The watcher of this process."""


def _reset_after_fork() -> None:
    """Start without a thread and without steps: a forked process has only the thread that called fork."""
    WATCH.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
