"""Errors of requests, their HTTP status, and their shape in each API."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from edgetune_runtime.errors import (
    BusyError,
    EdgetuneError,
    IncompatibleError,
    MissingLibraryError,
    NotFoundError,
    PromptTooLongError,
    UnsureError,
    UsageError,
)

_LOG = logging.getLogger(__name__)

OPENAI_PREFIX = "/v1/"
RETRY_AFTER_S = 1
_LONGEST = 1000
"""Characters of an error's text, which may repeat what the client sent."""
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    422: "unsure_error",
    503: "overloaded_error",
}


class RequestError(EdgetuneError):
    """A request that cannot be answered: its HTTP status, and OpenAI's `param` and `code`."""

    def __init__(
        self, message: str, remedy: str = "", *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, remedy)
        self.status, self.param, self.code = status, param, code


class ClientGoneError(EdgetuneError):
    """The client disconnected, so nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("the client disconnected")


class StoppingError(BusyError):
    """The server stops, so it ends the request or refuses it."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", "try again later")


def failure(error: Exception) -> EdgetuneError:
    """The error to report for `error`; one that the client is not to blame for is logged."""
    if isinstance(error, EdgetuneError):
        if status_of(error) == 500:
            _LOG.error("%s", error)
        return error
    _LOG.error("unexpected %s: %s", type(error).__name__, error, exc_info=_LOG.isEnabledFor(logging.DEBUG))
    return EdgetuneError(f"unexpected {type(error).__name__}", "see the server's log")


def status_of(error: EdgetuneError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, UsageError | IncompatibleError) and not isinstance(error, MissingLibraryError):
        return 400
    if isinstance(error, UnsureError):
        return 422
    return 503 if isinstance(error, BusyError) else 500


def body_of(error: EdgetuneError, path: str) -> Mapping[str, Any]:
    """The JSON of an error in the shape of the API that `path` belongs to."""
    text = _shortened(" ".join(str(error).split()))
    if not path.startswith(OPENAI_PREFIX):
        return {"error": text}
    param = _shortened(error.param) if isinstance(error, RequestError) and error.param else None
    code = error.code if isinstance(error, RequestError) else None
    if isinstance(error, PromptTooLongError):
        code = "context_length_exceeded"
    kind = _KINDS.get(status_of(error), "server_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def error_response(error: EdgetuneError, path: str) -> Response:
    """The response to a request that failed."""
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body_of(error, path), status_of(error), headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(dump(body), status, headers, "application/json")


def dump(body: object) -> bytes:
    """JSON on one line, as UTF-8."""
    # A model may write half a surrogate pair into the arguments of a call.
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _shortened(text: str) -> str:
    """The beginning, and the end with the remedy."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
