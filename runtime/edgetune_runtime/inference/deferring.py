"""Asks a bigger model behind an OpenAI-compatible address, within a time limit."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.text.chat import Message
from edgetune_runtime.tools.calls import ToolCall
from edgetune_runtime.tools.definitions import MODES, ToolSet
from edgetune_runtime.wording import shortened

TIMEOUT_S = 20.0
_MAX_BYTES = 1 << 20
_POLL_S = 0.1
"""How often the limits of the call are checked meanwhile."""


class DeferError(EdgetuneError):
    """The bigger model gave no answer that can be used."""


@dataclass(frozen=True)
class DeferTo:
    """A bigger model: the address of its API up to `/v1`, its name, and the seconds that an answer may take.

    `key` is sent as bearer token. UsageError for an address that is none.
    """

    url: str
    model: str
    timeout_s: float = TIMEOUT_S
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"the address to defer to is {self.url!r}", "give one such as http://192.168.1.2:8080/v1")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s is {self.timeout_s}", "give a number of seconds above 0")


def ask(
    to: DeferTo,
    messages: Sequence[Message],
    tools: ToolSet | None,
    output: OutputSpec | None,
    check: Callable[[], None],
) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of the bigger model's answer and its calls.

    DeferError if there is no answer, or one that the tools or the output constraint do not allow. Raises Stopped when
    `check` does.
    """
    body: dict[str, Any] = {"model": to.model, "messages": list(map(_sent, messages)), "temperature": 0}
    if tools is not None:
        named = {"type": "function", "function": {"name": tools.choice}}
        body |= {"tools": tools.definitions, "tool_choice": tools.choice if tools.choice in MODES else named}
    if output is not None and output.kind == "schema":
        schema = {"name": "answer", "schema": json.loads(output.text)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    text, calls = _read(to, _post(to, json.dumps(body).encode(), check))
    offered = {tool.name for tool in tools.offered} if tools is not None else set()
    unknown = next((call.name for call in calls if call.name not in offered), None)
    if unknown is not None:
        raise _error(to, f"called {unknown!r}, which is none of the tools")
    if not calls and output is not None and not replace(output, spacing="any").accepts(text):
        raise _error(to, f"answered {shortened(text, 80)!r}, which the output constraint does not allow")
    return text, calls


def _post(to: DeferTo, body: bytes, check: Callable[[], None]) -> bytes:
    """The reply, read by another thread, which ends soon after the time limit."""
    found: list[bytes | Exception] = []
    end_s = time.monotonic() + to.timeout_s

    def run() -> None:
        try:
            found.append(_reply(to, body, end_s))
        except urllib.error.HTTPError as error:
            error.close()
            found.append(error)
        except (OSError, HTTPException, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True, name="edgetune-defer")
    thread.start()
    while thread.is_alive() and (left_s := end_s - time.monotonic()) > 0:
        thread.join(min(_POLL_S, left_s))
        check()
    if not found or isinstance(found[0], TimeoutError):
        raise _error(to, f"did not answer within {to.timeout_s:g} s")
    if isinstance(found[0], Exception):
        raise _error(to, f"failed: {found[0]}") from found[0]
    return found[0]


def _reply(to: DeferTo, body: bytes, end_s: float) -> bytes:
    headers = {"Content-Type": "application/json"}
    if to.key is not None:
        headers["Authorization"] = f"Bearer {to.key}"
    address = f"{to.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(address, body, headers)
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(request, timeout=to.timeout_s) as response:
        parts, count = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            count += len(part)
            if count > _MAX_BYTES:
                raise ValueError(f"its reply has more than {_MAX_BYTES} bytes")
            if time.monotonic() > end_s:
                raise TimeoutError
    return b"".join(parts)


def _read(to: DeferTo, reply: bytes) -> tuple[str, tuple[ToolCall, ...]]:
    try:
        message = json.loads(reply)["choices"][0]["message"]
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _error(to, f"sent no chat completion: {error}") from error
    return text, tuple(calls)


def _error(to: DeferTo, what: str) -> DeferError:
    return DeferError(f"{to.model!r} at {to.url} {what}", "check the address, the model and the time limit")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A prompt and a key go to the given address only."""

    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401 - as in the base class
        return None


def _sent(message: Message) -> Mapping[str, Any]:
    """A message as OpenAI's API has it: the arguments of calls are JSON in a text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _call(function: Mapping[str, Any]) -> ToolCall:
    arguments = json.loads(function["arguments"])
    if not isinstance(function["name"], str) or not isinstance(arguments, dict):
        raise TypeError("a call has no name or no arguments")
    return ToolCall(function["name"], arguments, uuid.uuid4().hex[:9])
