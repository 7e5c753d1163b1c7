"""Asks a bigger model behind an OpenAI-compatible address, within a time limit."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, spec_of
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.text.chat import Message
from edgetune_runtime.tools.calls import ToolCall
from edgetune_runtime.tools.definitions import MODES, ToolSet
from edgetune_runtime.wording import shortened

from .chat_client import (
    check_address,
    checked_key,
    choice_of,
    format_of,
    post,
    reason_of,
    refused_key,
    unfenced,
    without,
    without_thought,
)

TIMEOUT_S = 20.0
_MAX_TIMEOUT_S = 3600.0
_MAX_REQUESTS = 32
"""How many requests may be open at once, also those that were given up and that the peer does not end."""
_POLL_S = 0.1
"""How often the limits of the call are checked meanwhile."""
_OPEN = threading.BoundedSemaphore(_MAX_REQUESTS)


class DeferError(EdgetuneError):
    """The bigger model gave no answer that can be used."""


@dataclass(frozen=True)
class DeferTo:
    """A bigger model: the address of its API up to `/v1`, its name, and the seconds that an answer may take.

    `key` is sent as bearer token. UsageError for an invalid address, key or time.
    """

    url: str
    model: str
    timeout_s: float = TIMEOUT_S
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_address(self.url)
        object.__setattr__(self, "key", checked_key(self.key))
        if not 0 < self.timeout_s <= _MAX_TIMEOUT_S:
            raise UsageError(f"timeout_s is {self.timeout_s}", f"give seconds above 0, and at most {_MAX_TIMEOUT_S:g}")


def ask(
    to: DeferTo,
    messages: Sequence[Message],
    tools: ToolSet | None,
    output: OutputSpec | None,
    check: Callable[[], None],
    *,
    stop: Sequence[str] = (),
) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of the bigger model's answer, up to the first of the `stop` texts, and its calls.

    Choices are named in the system prompt, as the API has no other way.

    DeferError if there is no answer, or one that the tools or the output constraint do not allow. Raises Stopped when
    `check` does.
    """
    if output is not None and output.kind == "choices":
        messages = _with_choices(messages, json.loads(output.text))
    body: dict[str, Any] = {"model": to.model, "messages": list(map(_sent, messages)), "temperature": 0}
    if tools is not None:
        named = {"type": "function", "function": {"name": tools.choice}}
        body |= {"tools": tools.definitions, "tool_choice": tools.choice if tools.choice in MODES else named}
    schema = None if output is None else output.schema
    if schema is not None:
        body["response_format"] = format_of(schema)
    text, calls = _read(to, _post(to, body, check))
    if schema is not None:
        text = unfenced(text)
    # Not sent: some models refuse them, and in what a model thinks before it answers they would end the answer.
    text = min((text.partition(end)[0] for end in stop), key=len, default=text).strip()
    if calls:
        return text, tuple(_fitting(to, call, tools) for call in calls)
    if not text:
        raise _error(to, "gave an empty answer")
    if tools is not None and tools.choice not in ("auto", "none"):
        raise _error(to, f"called no tool, and tool_choice is {tools.choice!r}")
    if output is not None and not _allows(output, text):
        raise _error(to, f"answered {shortened(text, 80)!r}, which the output constraint does not allow")
    return text, calls


def _allows(output: OutputSpec, text: str) -> bool:
    # Choices need no llguidance, which not every device has.
    return text in json.loads(output.text) if output.kind == "choices" else replace(output, spacing="any").accepts(text)


def _with_choices(messages: Sequence[Message], choices: Sequence[str]) -> list[Message]:
    line = f"Answer with one of these texts, and nothing else: {'; '.join(choices)}"
    first, *others = messages
    if first["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{line}"}, *others]


def _fitting(to: DeferTo, call: ToolCall, tools: ToolSet | None) -> ToolCall:
    """The call as a model that is held to the tools writes it; DeferError if these do not allow it."""
    tool = next((tool for tool in tools.offered if tool.name == call.name), None) if tools is not None else None
    if tool is None:
        raise _error(to, f"called {call.name!r}, which is not one of the tools")
    arguments = tool.ordered(call.arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    if not spec_of(schema=tool.schema, spacing="any").accepts(text):
        raise _error(to, f"called {call.name!r} with {shortened(text, 80)}, which its schema does not allow")
    return replace(call, arguments=arguments)


def _post(to: DeferTo, body: Mapping[str, Any], check: Callable[[], None]) -> bytes:
    """The reply, read by another thread, which may outlive the time limit if the peer sends a little now and then."""
    if not _OPEN.acquire(blocking=False):
        raise _error(to, f"has {_MAX_REQUESTS} requests that have not ended")
    outcome: list[bytes | Exception] = []
    end_s = time.monotonic() + to.timeout_s

    def run() -> None:
        try:
            outcome.append(_reply(to, body, end_s))
        except (OSError, HTTPException, ValueError) as error:
            outcome.append(error)
        finally:
            _OPEN.release()

    thread = threading.Thread(target=run, daemon=True, name="edgetune-defer")
    try:
        thread.start()
    except RuntimeError as error:
        _OPEN.release()
        raise _error(to, f"was not asked: {error}") from error
    while thread.is_alive() and (left_s := end_s - time.monotonic()) > 0:
        thread.join(min(_POLL_S, left_s))
        check()
    if not outcome or isinstance(outcome[0], TimeoutError):
        raise _error(to, f"did not answer within {to.timeout_s:g} s")
    if isinstance(outcome[0], Exception):
        raise _error(to, f"failed: {outcome[0]}") from outcome[0]
    return outcome[0]


def _reply(to: DeferTo, body: Mapping[str, Any], end_s: float) -> bytes:
    """The reply; a model that refuses a temperature is asked again without. Raises what `post` does."""
    try:
        return post(to.url, body, key=to.key, timeout_s=max(_POLL_S, end_s - time.monotonic()))
    except urllib.error.HTTPError as error:
        with error:
            reason = reason_of(error)
        refused = refused_key(body, error, reason)
        if refused is None:
            raise OSError(reason) from error
        return _reply(to, without(body, {refused}), end_s)


def _read(to: DeferTo, reply: bytes) -> tuple[str, tuple[ToolCall, ...]]:
    try:
        choice = choice_of(reply)
        message = choice["message"]
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        # A lone surrogate cannot be encoded.
        json.dumps([message, [call.arguments for call in calls]], ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _error(to, f"sent no chat completion: {error}") from error
    if (reason := choice.get("finish_reason")) in ("length", "content_filter"):
        raise _error(to, f"did not finish its answer: {reason}")
    if choice.get("is_unsure") is True:
        # Another edgetune server, whose question or other adapter may stand in place of its answer.
        raise _error(to, "is unsure too")
    return without_thought(message.get("content") or "").strip(), tuple(calls)


def _error(to: DeferTo, problem: str) -> DeferError:
    return DeferError(f"{to.model!r} at {to.url} {problem}", "check the address, the model and the time limit")


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
    return ToolCall(function["name"], arguments)
