"""HTTP on one connection: limits, timeouts, and the count of connections that wait for their client."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgetune_runtime.errors import BusyError

from .accepting import connections_within_files
from .connections import ClientConnection, Connections
from .problems import error_response
from .settings import ServerLimits, is_loopback

_LOG = logging.getLogger(__name__)
_MAX_CHECKS = 8
"""Connections of this machine beyond the limit that can ask whether the server is well."""
_CHECKS = frozenset({"/healthz", "/readyz"})
_PART_BYTES = 1 << 14
"""h11 checks the size of a request's head only between the parts that it gets."""
_MAX_CHUNKS = 2000
_MAX_HEADERS = 100
_LINGER_S = 2.0
"""Seconds in which a client can read why it was refused while it still sends."""
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class BoundedConnection(h11.Connection):
    """Reads requests with a limited number of headers and chunks, as each takes as long to read as a short request."""

    _chunks = 0

    def next_event(self) -> Any:  # noqa: ANN401 - as h11
        """The next part of a request; RemoteProtocolError if it is not HTTP or has too many parts."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
            if len(event.headers) > _MAX_HEADERS:
                raise h11.RemoteProtocolError(f"more than {_MAX_HEADERS} headers")
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            if self._chunks > _MAX_CHUNKS:
                raise h11.RemoteProtocolError(f"more than {_MAX_CHUNKS} chunks")
        return event


def protocol(limits: ServerLimits) -> type[H11Protocol]:
    """The protocol of a server's connections, which are counted together."""
    max_connections = connections_within_files(limits.connections)
    everyone = Connections(max_connections, limits.connections_per_address)
    checks = Connections(_MAX_CHECKS, _MAX_CHECKS)

    class Protocol(H11Protocol):
        """A connection, which is closed when the client sends or reads nothing for too long."""

        _arriving: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None
        _counted: tuple[Connections, ClientConnection] | None = None
        _lingers: asyncio.TimerHandle | None = None

        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as uvicorn calls it
            super().__init__(*args, **options)
            self.conn = BoundedConnection(h11.SERVER, _PART_BYTES)

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]  # it is a Transport, as for uvicorn
            if self._is_admitted():
                self._expect_request()
            else:
                self.transport.write(_REFUSED)
                self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """Answer as without the upgrade, which is optional; without the log's advice to install WebSockets."""

        def data_received(self, data: bytes) -> None:
            if self._lingers is not None:
                return
            for begin in range(0, len(data), _PART_BYTES):
                if not self.transport.is_closing():
                    super().data_received(data[begin : begin + _PART_BYTES])
            if self.cycle is not None and not self.cycle.response_complete:
                if not self.cycle.more_body and self.conn.trailing_data[0]:
                    # A client that pipelines requests without end would never let others in.
                    self.cycle.keep_alive = False
                self._cancel(self._arriving)
                self._arriving = None
            elif self._arriving is None:
                self._expect_request()
            self._count()

        def on_response_complete(self) -> None:
            if self.cycle.more_body and not self.transport.is_closing() and not self._has_short_body():
                # The request was refused, so the rest of its body is not worth reading. A short one may be on its way,
                # and the client would send its next request into a connection that is being closed.
                self.transport.write_eof()
                self._lingers = self.loop.call_later(_LINGER_S, self.transport.abort)
            super().on_response_complete()
            self._count()

        def _has_short_body(self) -> bool:
            lengths = [value for name, value in self.scope["headers"] if name == b"content-length"]
            return len(lengths) == 1 and lengths[0].isdigit() and int(lengths[0]) <= _PART_BYTES

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cancel(self._stalled)
            self._stalled = self.loop.call_later(limits.client_s, self._drop, "it does not read its answer")
            self._count()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel(self._stalled)
            self._stalled = None
            self._count()

        def send_400_response(self, msg: str) -> None:
            # Bytes that are not HTTP may also follow a request that is already answered.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel(self._arriving)
            self._cancel(self._stalled)
            self._cancel(self._lingers)
            if self._counted is not None:
                connections, connection = self._counted
                connections.leave(connection)
            super().connection_lost(exc)

        def _is_admitted(self) -> bool:
            # A client that has gone already has no address.
            address = None if self.client is None else self.client[0]
            if address is None:
                return False
            if self._is_admitted_by(everyone, address):
                return True
            self.app = _checks_only(self.app, max_connections)
            return is_loopback(address) and self._is_admitted_by(checks, address)

        def _is_admitted_by(self, connections: Connections, address: str) -> bool:
            connection = connections.admit(address, self._make_room)
            self._counted = None if connection is None else (connections, connection)
            return connection is not None

        def _count(self) -> None:
            if self._counted is None:
                return
            connections, connection = self._counted
            cycle = self.cycle
            is_answering = cycle is not None and not cycle.response_complete and not cycle.more_body
            if is_answering and self._stalled is None:
                connections.answer(connection)
            else:
                connections.wait(connection)

        def _make_room(self) -> None:
            _LOG.info("closed a connection that waited for its client, to make room for another one")
            self.transport.abort()

        def _expect_request(self) -> None:
            self._arriving = self.loop.call_later(limits.client_s, self._drop, "its request does not arrive")

        def _drop(self, reason: str) -> None:
            _LOG.info("dropped a client after %g s: %s", limits.client_s, reason)
            # `close` would wait until the client has read everything.
            self.transport.abort()

        def _cancel(self, timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Protocol


def _checks_only(app: Any, max_connections: int) -> ASGIApp:  # noqa: ANN401 - as uvicorn calls it
    """The application for a connection beyond the limit."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in _CHECKS:
            await app(scope, receive, send)
            return
        error = BusyError(f"all {max_connections} connections are in use", "try again later")
        response = error_response(error, scope["path"])
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    return answer
