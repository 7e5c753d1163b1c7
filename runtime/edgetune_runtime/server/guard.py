"""Middleware that checks a request's head (Host, Origin, key, length) before anything reads its body, and CORS."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .openai_answers import CONFIDENCE, UNSURE
from .problems import RequestError, error_response
from .settings import Access

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
"""Paths that need no key: they reveal nothing about the bundle, or load a page that asks for the key."""

_METHODS = "GET, POST, HEAD, OPTIONS"
_CORS_AGE_S = 600


class Guard:
    """Answers a request only if `access` allows it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._digests = [_digest(key) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or say why it is refused."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_foreign = origin is not None and not _is_own(origin, headers.get("host", ""))
        try:
            _check_length(scope["http_version"], headers)
            self._check(scope["path"], scope["method"], headers, origin if is_foreign else None)
        except RequestError as error:
            response = error_response(error, scope["path"])
            if error.status == 400:
                # Where the request ends is uncertain, so what comes next may not be a request.
                response.headers["Connection"] = "close"
            await response(scope, receive, _with_cors(send, origin) if self._is_listed(origin) else send)
            return
        if origin is None or not is_foreign:
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers)(scope, receive, _with_cors(send, origin))
        else:
            await self._app(scope, receive, _with_cors(send, origin))

    def _check(self, path: str, method: str, headers: Headers, foreign: str | None) -> None:
        host = headers.get("host", "")
        if not self._access.allows_host(host):
            message = f"Host {host!r} is not a name of this server"
            # Home Assistant takes 403 for a wrong key.
            raise RequestError(message, "use its IP address, or start it with --allow-host", status=421)
        if foreign is not None and not self._is_listed(foreign):
            message = f"Origin {foreign!r} may not use this server"
            raise RequestError(message, "start it with --allow-origin", status=403)
        # A browser sends no key with the request that asks whether it may send one.
        if self._digests and path not in OPEN_PATHS and method != "OPTIONS" and not self._has_key(headers):
            message = "the API key is missing or wrong"
            raise RequestError(message, "send it as Authorization: Bearer KEY", status=401, code="invalid_api_key")

    def _is_listed(self, origin: str | None) -> bool:
        return origin is not None and origin in self._access.origins

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = _digest(key.strip())
        # Each comparison takes the same time wherever the keys differ, and all keys are compared.
        matches = [hmac.compare_digest(sent, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _check_length(http_version: str, headers: Headers) -> None:
    """RequestError if a proxy before the server may see another end of the request (request smuggling)."""
    if "transfer-encoding" in headers and ("content-length" in headers or http_version == "1.0"):
        other = "Content-Length" if "content-length" in headers else "HTTP/1.0"
        raise RequestError(f"the request has Transfer-Encoding and {other}", "send one of them")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_own(origin: str, host: str) -> bool:
    """Whether a page of this server sends the request."""
    return bool(host) and origin in (f"http://{host}", f"https://{host}")


def _preflight(headers: Headers) -> Response:
    allowed = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", ""),
        "Access-Control-Max-Age": str(_CORS_AGE_S),
    }
    return Response(status_code=204, headers=allowed)


def _with_cors(send: Send, origin: str | None) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start" and origin is not None:
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = f"{CONFIDENCE}, {UNSURE}"
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_origin
