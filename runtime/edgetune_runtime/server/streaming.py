"""Streams the lines of an answer: an error before the first line sets the status, a later one is the last line."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgetune_runtime.errors import EdgetuneError

from .connection import until_disconnect
from .problems import error_response, failure

EVENTS = "text/event-stream"
NDJSON = "application/x-ndjson"
# Proxies such as nginx collect a response before they pass it on, unless told not to.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class LineResponse(Response):
    """Sends lines as they are made, and closes their generator as soon as the client disconnects.

    `error_line` is the last line after an error in the middle; an error before the first line is an error response.
    """

    def __init__(
        self, lines: AsyncGenerator[bytes, None], media_type: str, error_line: Callable[[EdgetuneError], bytes]
    ) -> None:
        self._lines, self._error_line = lines, error_line
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; ClientGoneError if the client disconnects."""
        await until_disconnect(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines) as lines:
            try:
                line = await anext(lines)
            except Exception as error:
                await error_response(failure(error), scope["path"])(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": line, "more_body": True})
            try:
                async for line in lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            except Exception as error:
                line = self._error_line(failure(error))
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
