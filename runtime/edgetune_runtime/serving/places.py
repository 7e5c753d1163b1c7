"""Limits how many calls run and how many wait at the same time, over all models of a runtime."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from edgetune_runtime.errors import BusyError, UsageError
from edgetune_runtime.wording import CLOSED

from .turns import POLL_S

PATIENCE_S = 2.0
"""How long a call waits for streams that its own thread read last: another thread may read them on."""

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Reader:
    """The asyncio task that awaits the call of a thread, or that read its stream last."""

    task: asyncio.Task[Any] | None

    def is_gone_or(self, other: Reader | None) -> bool:
        """Whether the task has ended, or is that of the other reader."""
        return self.task is not None and (self.task.done() or (other is not None and self.task is other.task))


READER: ContextVar[Reader | None] = ContextVar("READER", default=None)
"""The one of this thread, if the call was made by asyncio."""


class Holder:
    """A call or a measurement that has a place or a context, and the thread that used it last.

    A stream is suspended while its reader has a piece; any thread may read on. It roams unless one thread has read the
    last two pieces.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.reader = READER.get()
        self.is_suspended = False
        self.roams = True

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread used it last, or it is suspended and nobody else reads it.

        A thread or a task that has ended may have left it, or the task that reads it awaits this thread.
        """
        if self.thread is threading.current_thread():
            return True
        is_of_task = self.reader is not None and self.reader.is_gone_or(READER.get())
        return self.is_suspended and (is_of_task or not self.thread.is_alive())


class Fork(Protocol):
    """A context beside the first one of its model."""

    holder: Holder | None

    def retire(self) -> None:
        """Keep the state of the sequence in the cache, and free the context."""


class Patience:
    """Ends a wait for streams of the waiting thread itself, which would last forever."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def check(self, holders: Iterable[Holder]) -> None:
        """Raise UsageError if for `PATIENCE_S` all holders have been `is_of_this_thread`."""
        now_s = time.monotonic()
        if not all(holder.is_of_this_thread for holder in list(holders)):
            self._since_s = now_s
        elif now_s - self._since_s >= PATIENCE_S:
            raise UsageError("a stream is still open that nobody else reads", "read it to its end or close it first")


class Places:
    """Lets up to `limit` calls run at the same time, whatever their models; up to `max_waiting` more wait.

    Each model has a first context; `forks` are those beside them, up to `limit` - 1 in total. `gate` guards all of it,
    and who holds which context; it is held for moments only. Whoever changes something notifies `changed` in it.
    """

    def __init__(self, limit: int = 1, max_waiting: int = 0) -> None:
        # Not entered through the condition, whose `__enter__` may be interrupted by Ctrl-C when it has the lock.
        self.gate = threading.RLock()
        self.changed = threading.Condition(self.gate)
        self.limit = limit
        self.forks: list[Fork] = []
        self._max_waiting, self._waiting = max_waiting, 0
        self._running: set[Holder] = set()
        self._forking: Holder | None = None
        self._is_closed = False

    @contextmanager
    def enter(self, check: Callable[[], None]) -> Iterator[Holder]:
        """Wait for a place, until `check` raises, and leave it at the end.

        BusyError when too many calls are already waiting. UsageError when it would wait for streams of this thread
        alone, or the runtime is closed.
        """
        holder = Holder()
        try:
            with self.gate:
                self.check_open()
                if len(self._running) >= self.limit:
                    self._wait(check)
                self._running.add(holder)
            yield holder
        finally:
            with self.gate:
                self._running.discard(holder)
                if self._forking is holder:
                    self._forking = None
                self.changed.notify_all()

    def may_fork(self, holder: Holder) -> bool:
        """Whether a call may make a context beside a first one; `forked` has to follow. Call it in the gate.

        For this, an idle one is freed if need be: that of another model, as a call takes those of its own.
        """
        if self._forking or (len(self.forks) >= self.limit - 1 and not self._retire_idle()):
            return False
        self._forking = holder
        return True

    def forked(self, made: Fork | Exception) -> None:
        """Count the context that `may_fork` allowed, or lower the limit after an error. Call it in the gate.

        The limit is then the number of contexts that there are, unless an idle one can be freed.
        """
        self._forking = None
        if not isinstance(made, Exception):
            self.forks.append(made)
        elif not self._retire_idle():
            self.limit = len(self.forks) + 1
            _LOG.warning("from now on at most %d calls run at the same time: %s", self.limit, made)
        self.changed.notify_all()

    def close(self) -> None:
        """Refuse all calls from now on, also those that wait."""
        with self.gate:
            self._is_closed = True
            self.changed.notify_all()

    def check_open(self) -> None:
        """Raise UsageError after `close`."""
        if self._is_closed:
            raise UsageError(*CLOSED)

    def _wait(self, check: Callable[[], None]) -> None:
        others = any(not holder.is_of_this_thread for holder in list(self._running))
        if others and self._waiting >= self._max_waiting:
            message = f"{self._waiting} calls are already waiting for one of {self.limit} contexts"
            raise BusyError(message, "try again later, or open the bundle with more contexts or more waiting")
        patience = Patience()
        self._waiting += 1
        try:
            while len(self._running) >= self.limit:
                patience.check(self._running)
                self.changed.wait(POLL_S)
                check()
                self.check_open()
        finally:
            self._waiting -= 1

    def _retire_idle(self) -> bool:
        idle = next((fork for fork in self.forks if fork.holder is None), None)
        if idle is None:
            return False
        idle.retire()
        self.forks.remove(idle)
        return True
