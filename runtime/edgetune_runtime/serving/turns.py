"""Let contexts take turns computing, first come first served, and let threads wait for a free context."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 0.05
"""How often a waiting call checks whether it must stop."""


class Turns:
    """Lets the contexts on one base take turns computing, first come first served.

    Two engines that compute at the same time on the same cores are slower than one after the other. `gate` guards which
    thread holds which context.
    """

    def __init__(self) -> None:
        self.gate = threading.Condition()
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @contextmanager
    def take(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for this thread's turn, unless `check` raises; pass it on when the block ends."""
        mine: threading.Event | None = None
        with self._lock:
            if self._taken:
                mine = threading.Event()
                self._waiting.append(mine)
            self._taken = True
        if mine is not None:
            self._wait(mine, check)
        try:
            yield
        finally:
            self._pass_on()

    def _wait(self, mine: threading.Event, check: Callable[[], None]) -> None:
        try:
            while not mine.wait(POLL_S):
                check()
        except BaseException:
            with self._lock:
                is_mine = mine not in self._waiting
                if not is_mine:
                    self._waiting.remove(mine)
            if is_mine:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
