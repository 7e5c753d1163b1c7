"""Streams the lines of an answer: an error before the first line sets the status, a later one is the last line."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .connection import until_disconnect
from .problems import body_of, dump, error_response, failure

EVENTS = "text/event-stream"
NDJSON = "application/x-ndjson"
# Proxies such as nginx collect a response before they pass it on, unless told not to.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(body: object) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dump(body)


def line(body: object) -> bytes:
    """A line of NDJSON."""
    return dump(body) + b"\n"


class LineResponse(Response):
    """Sends events or lines as they are made, and closes their generator as soon as the client disconnects."""

    def __init__(self, lines: AsyncGenerator[bytes, None], media_type: str) -> None:
        self._lines = lines
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; ClientGoneError if the client disconnects."""
        await until_disconnect(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines) as lines:
            try:
                part = await anext(lines)
            except Exception as error:
                await error_response(failure(error), scope["path"])(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": part, "more_body": True})
            try:
                async for part in lines:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Exception as error:
                body = body_of(failure(error), scope["path"])
                last = event(body) if self.media_type == EVENTS else line(body)
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
