"""Sends HTTP requests over connections that are kept, one per host, within limits of time."""

from __future__ import annotations

import io
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import IO

from edgetune_runtime import __version__
from edgetune_runtime.errors import importing

from .slow_replies import Reply

with importing("updates need", '"edgetune-runtime[update]"'):
    from urllib3 import (
        BaseHTTPResponse,
        HTTPConnectionPool,
        HTTPResponse,
        HTTPSConnectionPool,
        PoolManager,
        ProxyManager,
    )
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import HTTPError
    from urllib3.util import make_headers, parse_url

SILENT_S = 30.0
"""Limit of connecting, and of the pause between two bytes."""
_MOST_REDIRECTS = 3
_SMALL_BYTES = 1 << 14
"""So much of what the caller leaves of a body is read, to keep the connection; it is closed if there is more."""


class StatusError(OSError):
    """An HTTP status other than success, with the final address, the headers and the start of the body."""

    def __init__(self, reply: BaseHTTPResponse, body: bytes) -> None:
        super().__init__(f"status {reply.status}")
        self.status, self.url, self.headers, self.body = reply.status, reply.url or "", reply.headers, body


class HttpClient:
    """Sends requests to addresses of HTTP and HTTPS; `agent` is the program that does so.

    A connection is kept for the next request to the same host, until `close`. Proxies are those of the environment, and
    trusted certificates those of the system.
    """

    def __init__(self, agent: str) -> None:
        self._headers = {"User-Agent": f"{agent}/{__version__}", "Accept-Encoding": "identity"}
        self._managers: dict[str, PoolManager] = {}

    def close(self) -> None:
        """Close the connections."""
        for manager in self._managers.values():
            manager.clear()

    @contextmanager
    def reply(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | IO[bytes] | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """The reply to a request, whose body the block reads. GET and HEAD follow redirects, without `Authorization`.

        Raises StatusError, OSError with the reason if a connection or a reply fails or is too slow, also while the
        block reads, and ValueError for an invalid address.
        """
        redirects = _MOST_REDIRECTS if method in {"GET", "HEAD"} else 0
        try:
            with closing(self._follow(method, url, {**self._headers, **(headers or {})}, body, redirects)) as reply:
                if reply.status // 100 != 2:
                    raise StatusError(reply, _rest_of(reply))
                yield reply
                _rest_of(reply)
        except HTTPError as error:
            reason = _reason_of(error)
            raise ConnectionError(str(reason) or type(reason).__name__) from error

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: bytes | IO[bytes] | None, redirects: int
    ) -> BaseHTTPResponse:
        """The reply after at most so many redirects, none of which gives up encryption."""
        reply = self._send(method, url, headers, body)
        place = reply.get_redirect_location()
        if not place or not redirects:
            return reply
        with closing(reply):
            _rest_of(reply)
        target = urllib.parse.urljoin(url, place)
        if urllib.parse.urlsplit(target).scheme not in {urllib.parse.urlsplit(url).scheme, "https"}:
            raise ConnectionError(f"it is redirected to {target[:200]}")
        headers.pop("Authorization", None)
        return self._follow(method, target, headers, body, redirects - 1)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | IO[bytes] | None
    ) -> BaseHTTPResponse:
        send = partial(
            self._manager_for(url).urlopen,
            *(method, url),
            headers=headers,
            body=body,
            timeout=SILENT_S,
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            enforce_content_length=False,
        )
        try:
            reply = send()
        except HTTPError as error:
            # Only a server can know when it closes a connection that was kept.
            if not any(isinstance(each, _ClosedMeanwhileError) for each in error.args):
                raise
            if isinstance(body, io.IOBase):
                body.seek(0)
            reply = send()
        reply.url = url
        return reply

    def _manager_for(self, url: str) -> PoolManager:
        """The connections to a proxy, or those without one."""
        parts = urllib.parse.urlsplit(url)
        is_direct = urllib.request.proxy_bypass(parts.netloc)
        proxy = "" if is_direct else urllib.request.getproxies().get(parts.scheme, "")
        if proxy not in self._managers:
            self._managers[proxy] = _new_manager(proxy)
        return self._managers[proxy]


class _ClosedMeanwhileError(ConnectionError):
    """A server has closed a connection that was kept, instead of a reply."""


class _Connection(HTTPConnection):
    response_class = Reply
    _replied: object = None

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        """The next reply; _ClosedMeanwhileError if there is none, but was one before."""
        used = self.sock
        try:
            reply = super().getresponse()
        except ConnectionError as error:
            if used is not self._replied:
                raise
            raise _ClosedMeanwhileError(str(error)) from error
        self._replied = used
        return reply


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _new_manager(proxy: str) -> PoolManager:
    """Connections to hosts, or to a proxy if its address is not empty; without a scheme it is one of HTTP."""
    manager = PoolManager()
    if proxy:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        login = urllib.parse.unquote(parse_url(proxy).auth or "")
        manager = ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=login or None))
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


def _rest_of(reply: BaseHTTPResponse) -> bytes:
    """Read up to `_SMALL_BYTES` of what is left of a body; nothing if that fails."""
    with suppress(HTTPError):
        return reply.read(_SMALL_BYTES)
    return b""


def _reason_of(error: BaseException) -> BaseException:
    """The error of the network, of TLS or of the reply that one of urllib3 is about."""
    causes = [each for each in (error.__cause__, *error.args) if isinstance(each, Exception)]
    return _reason_of(causes[0]) if causes and isinstance(error, HTTPError) else error
