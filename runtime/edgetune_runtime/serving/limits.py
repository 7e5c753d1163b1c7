"""When a call is to stop: at a deadline, or once an event is set."""

from __future__ import annotations

import threading
import time

from edgetune_runtime.errors import UsageError


class Stopped(Exception):  # noqa: N818 - no error: the call ends with what it has
    """A call is to stop; `reason` is `cancelled` or `deadline`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Limits:
    """When a call is to stop; UsageError for a deadline that is not positive."""

    def __init__(self, deadline_s: float | None = None, cancel: threading.Event | None = None) -> None:
        if deadline_s is not None and not deadline_s > 0:
            raise UsageError(f"deadline_s is {deadline_s}", "give seconds, more than 0")
        self._end = None if deadline_s is None else time.monotonic() + deadline_s
        self._cancel = cancel

    def reason(self) -> str:
        """Why the call is to stop now: `cancelled` or `deadline`; empty while it is not."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        return "deadline" if self._end is not None and time.monotonic() >= self._end else ""

    def check(self) -> None:
        """Raise Stopped when the call is to stop now."""
        if reason := self.reason():
            raise Stopped(reason)
