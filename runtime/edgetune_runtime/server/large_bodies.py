"""Middleware that bounds memory: it limits how many requests with a large body are handled at the same time."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgetune_runtime.errors import BusyError

LARGE_BYTES = 65_536
"""A chat that fills a context of 8,192 tokens has about half of this."""
_MAX = 4


class LargeBodies:
    """Refuses a large body while `_MAX` others are there; what their JSON becomes may take 25 times their size."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._count = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Reading its body raises BusyError where it is one too many."""
        size, is_counted = 0, False

        async def counting() -> Message:
            nonlocal size, is_counted
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGE_BYTES and not is_counted:
                if self._count >= _MAX:
                    reason = f"{self._count} requests with more than {LARGE_BYTES} bytes are already there"
                    raise BusyError(reason, "try again later, or send less")
                self._count, is_counted = self._count + 1, True
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._count -= is_counted
