"""Sends a request to a model behind an address that speaks OpenAI's chat API, bounded in time and bytes."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from typing import IO, Any
from urllib.parse import urlsplit

from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import shortened

OF_ONE_REQUEST = frozenset((400, 413, 422))
"""Statuses of a request that is too long, or that a filter refuses; others may be answered."""

_MAX_BYTES = 1 << 20
_SHORTEST_SECRET = 6
"""Characters of a key that is not one of the words that servers without keys are given."""
_REFUSED = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None, "response_format": None}
"""What OpenAI's newer models refuse, which think before they answer, and its other name if it has one. Other servers
refuse the other name, or ignore it. Many know no schema."""


_FENCED = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
_THOUGHT = re.compile(r"\A(?:\s*<think>.*?(?:</think>|\Z)|(?!\s*[{\[]).*?</think>(?=\s*(?:\n|\Z|[{\[])))", re.DOTALL)
"""What comes before an answer; some templates begin a thought in the prompt."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the prompts and the key are for the address that the user named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - urllib's arguments
        """None, so that urllib raises the status."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def check_address(url: str) -> None:
    """Raise UsageError unless it is the address of an API up to `/v1`."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"{url!r} is not an address of a model", "give one such as http://192.168.1.2:8080/v1")


def checked_key(key: str | None) -> str | None:
    """The key without white space around it; UsageError, in which it is not, for one that no request can carry."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError("the key has characters that are not printable ASCII", "copy it again")
    return key or None


def without_key(text: str, key: str | None) -> str:
    """A text for a message, without the key that a server may repeat in it."""
    return text.replace(key, "…") if key is not None and len(key) >= _SHORTEST_SECRET else text


def format_of(schema: object) -> dict[str, Any]:
    """The `response_format` of a request for an answer in JSON that fits a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def post(url: str, body: Mapping[str, Any], *, key: str | None, timeout_s: float) -> bytes:
    """The reply to a request for a chat completion; a `checked_key` is sent as bearer token.

    Raises TimeoutError after so many seconds, OSError with the system's words and HTTPException as urllib does,
    HTTPError with what the server says as reason, and ValueError for a reply of more than 1 MiB.
    """
    end_s = time.monotonic() + timeout_s
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return _read(response, end_s)
    except urllib.error.HTTPError as error:
        with error:
            reason = _said_in(error, key, end_s)
        raise urllib.error.HTTPError(error.url, error.code, reason, error.headers, io.BytesIO()) from error
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise cause from None
        raise OSError(getattr(cause, "strerror", None) or str(cause)) from error


def _read(response: IO[bytes], end_s: float) -> bytes:
    """A whole body; TimeoutError when it takes longer, ValueError if it has too many bytes."""
    body = bytearray()
    # HTTPResponse has read1, which waits for one part alone.
    while part := response.read1(1 << 16):  # type: ignore[attr-defined]
        body += part
        if len(body) > _MAX_BYTES:
            raise ValueError(f"its reply has more than {_MAX_BYTES} bytes")
        if time.monotonic() > end_s:
            raise TimeoutError("the whole reply takes too long")
    return bytes(body)


def reason_of(error: urllib.error.HTTPError) -> str:
    """The status of a refusal that `post` raises, and what the server says about it."""
    return f"HTTP {error.code}: {error.reason}"


def _said_in(error: urllib.error.HTTPError, key: str | None, end_s: float) -> str:
    """What the server says about a refusal, without the key."""
    try:
        said = str(json.loads(_read(error, end_s))["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        said = str(error.reason)
    return shortened(without_key(said, key), 200)


def refused_key(body: Mapping[str, Any], error: urllib.error.HTTPError, reason: str) -> str | None:
    """The key of a request for which it was refused, if `without` can do without it."""
    if error.code not in OF_ONE_REQUEST:
        return None
    return next((key for key in _REFUSED if key in body and key in reason), None)


def without(body: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A request without these keys, of which some have another name."""
    named = ((_REFUSED[key] if key in keys else key, value) for key, value in body.items())
    return {key: value for key, value in named if key is not None}


def choice_of(reply: bytes) -> dict[str, Any]:
    """The first choice of a chat completion, with its `message`; ValueError for other bytes."""
    try:
        choice = json.loads(reply)["choices"][0]
        if not isinstance(choice["message"].get("content") or "", str):
            raise TypeError("its content is not text")
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no chat completion: {error}") from error
    return dict(choice)


def without_thought(text: str) -> str:
    """An answer without what a model that thinks has written before it."""
    return _THOUGHT.sub("", text)


def unfenced(text: str) -> str:
    """The text in a code block of Markdown, if that is all that an answer has."""
    fenced = _FENCED.fullmatch(text)
    return text if fenced is None else fenced[1]
