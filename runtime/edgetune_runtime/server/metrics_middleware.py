"""Middleware that counts and logs requests by route and status."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answer_request import ARRIVED, CLIENT
from .metrics import Metrics
from .problems import ClientGoneError

LOG = logging.getLogger(__name__)
"""Has an info line for each request."""
GONE = 499
"""The status under which a client that disconnected is counted, as in nginx."""
_LOGGED = 200


class MetricsMiddleware:
    """Counts each request; it has to be the first middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        status = GONE
        has_started = False
        begin_s = time.monotonic()
        ARRIVED.set(begin_s)
        CLIENT.set((scope.get("client") or [""])[0])

        async def counting(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except ClientGoneError:
            status = GONE
            if not has_started:
                # Nobody reads it; the server requires a response.
                await send({"type": "http.response.start", "status": GONE, "headers": []})
                await send({"type": "http.response.body", "body": b""})
        finally:
            # Unknown paths would make as many counters as a client likes.
            route = scope.get("route")
            self._metrics.count_request(getattr(route, "path", "other"), status)
            # As it was sent, without line breaks.
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:_LOGGED]
            LOG.info("%s %s %d %.0f ms", scope["method"], path, status, 1000 * (time.monotonic() - begin_s))
