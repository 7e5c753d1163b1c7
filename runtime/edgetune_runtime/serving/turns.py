"""Threads in, one at a time out: whose turn it is to compute, and the gate at which threads wait for a context."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.05
"""How often a call that waits looks whether it is to stop."""


class Turns:
    """What the contexts of one base share: the cores, taken in turns in the order of asking, and a gate.

    Two engines that compute at once on the same cores are slower than one after the other.
    """

    def __init__(self) -> None:
        self.gate = threading.Condition()
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @contextmanager
    def take(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for one's turn, in which `check` may end the call, and hand it on at the end."""
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
            self._hand_on()

    def _wait(self, mine: threading.Event, check: Callable[[], None]) -> None:
        try:
            while not mine.wait(LOOK_S):
                check()
        except BaseException:
            with self._lock:
                is_mine = mine not in self._waiting
                if not is_mine:
                    self._waiting.remove(mine)
            if is_mine:
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
