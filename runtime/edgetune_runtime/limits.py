"""Limits of a call: a deadline and a cancellation event."""

from __future__ import annotations

import threading
import time
from numbers import Real

from .errors import UsageError


class Stopped(Exception):  # noqa: N818 - not an error: the call ends with the text so far
    """A call must stop; `reason` is `cancelled` or `deadline`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def no_limits() -> None:
    """The check of a call without limits."""


def check_cancel(cancel: object) -> None:
    """UsageError for anything but an event."""
    if cancel is not None and (not hasattr(cancel, "is_set") or isinstance(cancel, type)):
        raise UsageError(f"cancel is {cancel!r}", "give a threading.Event")


class CallLimits:
    """When a call must stop; UsageError for a deadline that is not positive, and for what `check_cancel` refuses."""

    def __init__(self, deadline_s: float | None = None, cancel: threading.Event | None = None) -> None:
        if deadline_s is not None and not (isinstance(deadline_s, Real) and deadline_s > 0):
            raise UsageError(f"deadline_s is {deadline_s!r}", "give a number of seconds above 0")
        check_cancel(cancel)
        self._end = None if deadline_s is None else time.monotonic() + min(deadline_s, threading.TIMEOUT_MAX)
        self._cancel = cancel

    def reason(self) -> str:
        """Why the call must stop now: `cancelled` or `deadline`; empty if it may continue."""
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        return "deadline" if self._end is not None and time.monotonic() >= self._end else ""

    def check(self) -> None:
        """Raise Stopped if the call must stop now."""
        if reason := self.reason():
            raise Stopped(reason)
