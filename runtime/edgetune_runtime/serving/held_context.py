"""Lets one call or measurement at a time hold a context, and a stream suspend it for its reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgetune_runtime.engines.base import Engine
from edgetune_runtime.errors import UsageError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.wording import CLOSED

from .places import Holder, Patience, Places
from .turns import POLL_S


class HeldContext:
    """An engine that only its `holder` uses, if there is one; `places` guards who that is."""

    def __init__(self, engine: Engine, places: Places) -> None:
        self.engine = engine
        self.holder: Holder | None = None
        self.closed = False
        self._places = places
        self._check: Callable[[], None] = no_limits

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the context; UsageError when a stream that this thread read last has it (see `Patience`)."""
        self.acquire()
        try:
            self.check_open()
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Wait until nothing else holds the context, and hold it; `release` must follow. Same errors as `hold`."""
        patience = Patience()
        with self._places.gate:
            while self.holder is not None:
                patience.check([self.holder])
                self._places.changed.wait(POLL_S)
            self.holder = Holder()

    def release(self) -> None:
        """Let others hold the context."""
        self._check = no_limits
        try:
            self.engine.end_threads()
        finally:
            with self._places.gate:
                self.holder = None
                self._places.changed.notify_all()

    def suspend(self) -> None:
        """Suspend the stream that holds the context while its reader has a piece; any thread may resume it."""
        assert self.holder is not None
        if self.holder.roams:
            # Whoever reads on cannot end this thread's. Starting them for each piece takes a fifth more time.
            self.engine.end_threads()
        self.holder.is_suspended = True

    def resume(self) -> None:
        """Go on with the stream, on this thread; UsageError if the context was closed meanwhile."""
        with self._places.gate:
            self.check_open()
            assert self.holder is not None
            thread = threading.current_thread()
            self.holder.roams = self.holder.thread is not thread
            self.holder.thread, self.holder.is_suspended = thread, False

    def check_open(self) -> None:
        """Raise UsageError if the context is closed."""
        if self.closed:
            raise UsageError(*CLOSED)
