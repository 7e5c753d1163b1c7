"""Let contexts take turns computing, each with its share of the threads, steps of answers before those of prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgetune_runtime.limits import no_limits

POLL_S = 0.05
"""How often a waiting call checks whether it must stop."""
_RECENT_S = 0.05
"""A call that computed so recently is expected back: it samples a token, or hands one on."""
_PATIENCE_S = 0.1
"""So long the step of a prompt lets steps of answers go first, which are shorter and which a reader waits for."""


@dataclass
class Turn:
    """The threads that a call may compute with, and whether others compute at the same time."""

    threads: int
    is_shared: bool


@dataclass
class _Waiter:
    call: int
    patient_until: float
    admitted: threading.Event = field(default_factory=threading.Event)


class Turns:
    """Divides the threads among the calls that compute on one base.

    A call alone gets all threads. Several, where `shares` allows it, compute at the same time with an equal part each:
    the threads of one step wait for each other hundreds of times, those of different calls never. Calls beyond the
    number of threads wait until a step ends, in the order in which they came; steps of prompts let others go first for
    a while. A call is known by its thread.
    """

    def __init__(self, max_threads: int, *, shares: bool) -> None:
        self._max_threads, self._shares = max_threads, shares
        self._alone = self._limit = max_threads
        self._lock = threading.Lock()
        self._waiting: list[_Waiter] = []
        self._running: dict[int, Turn] = {}
        self._ended_s: dict[int, float] = {}
        self._core_s, self._counted_s = 0.0, 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no call computes or waits."""
        return not self._running and not self._waiting

    def core_s(self) -> float:
        """The core-seconds that all turns together were given so far."""
        with self._lock:
            return self._count()

    def divide(self, alone: int, limit: int) -> None:
        """From now on give `alone` threads to a call alone, and one to each of several, up to `limit` together."""
        with self._lock:
            self._alone, self._limit = alone, limit

    @contextmanager
    def take(self, check: Callable[[], None] = no_limits, *, is_prompt: bool = False) -> Iterator[Turn]:
        """Wait for this thread's turn, unless `check` raises; pass it on when the block ends."""
        waiter = _Waiter(threading.get_ident(), time.monotonic() + _PATIENCE_S if is_prompt else 0.0)
        try:
            with self._lock:
                # Ctrl-C may have left a turn of this thread.
                self._drop(waiter.call)
                self._waiting.append(waiter)
                self._admit()
            while not waiter.admitted.wait(POLL_S):
                check()
            yield self._running[waiter.call]
        finally:
            with self._lock:
                self._drop(waiter.call)
                self._admit()

    def _drop(self, call: int) -> None:
        """Let a call neither compute nor wait. Call it with the lock."""
        self._waiting = [waiter for waiter in self._waiting if waiter.call != call]
        if call in self._running:
            self._count()
            del self._running[call]
            self._ended_s[call] = time.monotonic()

    def _admit(self) -> None:
        """Give those who wait their turns, as far as there are threads. Call it with the lock."""
        while self._waiting and (threads := self._part()):
            now = time.monotonic()
            waiter = next((one for one in self._waiting if one.patient_until <= now), self._waiting[0])
            self._waiting.remove(waiter)
            self._count()
            self._running[waiter.call] = Turn(threads, is_shared=bool(self._running))
            if len(self._running) > 1:
                for turn in self._running.values():
                    turn.is_shared = True
            waiter.admitted.set()

    def _part(self) -> int:
        """The threads for the next call; 0 if it has to wait."""
        running = [turn.threads for turn in self._running.values()]
        if not self._shares:
            return 0 if running else self._alone
        calls = self._calls()
        total = max(self._alone, min(calls, self._limit))
        part, more = divmod(total, calls)
        # The remainder goes to as many calls, one thread each.
        part += sum(threads > part for threads in running) < more
        return max(0, min(total - sum(running), max(1, part)))

    def _calls(self) -> int:
        """The number of calls that compute, wait, or are expected back."""
        now = time.monotonic()
        self._ended_s = {call: ended for call, ended in self._ended_s.items() if now - ended < _RECENT_S}
        return len({*self._running, *self._ended_s, *(waiter.call for waiter in self._waiting)})

    def _count(self) -> float:
        """Bring the core-seconds up to now. Call it with the lock, before the turns change."""
        now = time.perf_counter()
        self._core_s += (now - self._counted_s) * sum(turn.threads for turn in self._running.values())
        self._counted_s = now
        return self._core_s
