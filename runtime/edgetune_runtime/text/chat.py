"""Render chat messages with the model's chat template, as transformers does."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import IncompatibleError, UsageError, importing
from edgetune_runtime.limits import no_limits
from edgetune_runtime.wording import shortened

from .json_text import json_or_none

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""A message as in OpenAI's API: `role` and `content`, and where they apply `tool_calls`, `tool_call_id` and `name`."""
Prompt = str | Sequence[Message]
"""A text of the user, or chat messages."""
_OPTIONAL_TEXTS = ("tool_call_id", "name")
_TEXTS = ("role", "content", *_OPTIONAL_TEXTS)


def messages_for(prompt: Prompt, system: str | None) -> list[Message]:
    """The messages to render: a text becomes a user message; `system` is added unless the first message is one.

    A content of text parts is joined, and a missing one beside `tool_calls` becomes an empty text. Arguments in JSON
    become objects. Calls without an id get one, and results without the id of their call that of the first call of the
    latest turn with calls that has no result.

    UsageError for what is neither a text nor messages, and, with the number of the message, for one that is not of this
    form.
    """
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping | Iterator):
        raise UsageError(f"the prompt is {shortened(repr(prompt))}", "give a text, or a list of messages")
    prompt_messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not prompt_messages:
        raise UsageError("the list of messages is empty", "give at least one message")
    messages = [_message(number, message) for number, message in enumerate(prompt_messages, 1)]
    _pair_ids(messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return list(messages)


def text_of(prompt: Prompt) -> str:
    """The one text of a prompt; UsageError for a conversation, which an encoder does not read."""
    messages = messages_for(prompt, None)
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UsageError(f"an encoder reads one text, not messages of: {', '.join(roles)}", "give the text alone")
    text: str = messages[0]["content"]
    return text


def render(
    template: str | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos: str = "",
    eos: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    think: bool | None = None,
    check: Callable[[], None] = no_limits,
) -> str:
    """Render the prompt; without a template, join the contents with newlines.

    The template gets `tools` and the messages' calls as they are: see `tools.prompts` for templates that ignore them.
    If `think` is given, it is the template's `enable_thinking`. `check` is called at each step of the template, and
    ends it by raising.

    UsageError when the template refuses the messages, IncompatibleError when it is invalid or exceeds a limit.
    """
    if template is None:
        return "\n".join(message["content"] for message in messages)
    compiled = _compile(template)
    from .templates import Budget, LimitError, rendered  # noqa: PLC0415 - a third of the start-up time

    budget = Budget([messages, tools], check)
    try:
        return rendered(
            compiled,
            budget,
            messages=[dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            **({} if think is None else {"enable_thinking": think}),
        )
    except LimitError as error:
        message = f"the chat template of the base exceeds a limit: {error}"
        raise IncompatibleError(message, "shorten the messages, or use a base with another chat template") from error
    except Exception as error:  # a template can raise anything that an operator or a filter raises
        if error is budget.stopped:
            raise
        message = f"the chat template of the base refused the messages: {_reason(error)}"
        raise UsageError(message, "change their roles or order") from error


def _reason(error: Exception) -> str:
    return shortened(str(error)) or type(error).__name__


def _message(number: int, message: object) -> dict[str, Any]:
    """The message with a content of text and calls with objects as arguments."""
    result = dict(message) if isinstance(message, Mapping) else {}
    calls = result.pop("tool_calls", None)
    content = _text_of_parts(result.get("content"))
    if calls and content is None:
        content = ""
    if not isinstance(result.get("role"), str) or not isinstance(content, str):
        raise UsageError(f"message {number} is {message!r}", 'give {"role": TEXT, "content": TEXT}')
    result["content"] = content
    for name in _OPTIONAL_TEXTS:
        if not isinstance(result.get(name), str | None):
            raise UsageError(f"message {number} has {name} {result[name]!r}", "give a text")
    if calls:
        if result["role"] != "assistant":
            raise UsageError(
                f"message {number} has tool_calls, but its role is {result['role']!r}", "use role assistant"
            )
        if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
            raise UsageError(f"message {number} has tool_calls of type {type(calls).__name__}", "give a list")
        result["tool_calls"] = [_call(number, call) for call in calls]
    try:
        json.dumps({name: value for name, value in result.items() if name not in _TEXTS})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"message {number} is not JSON: {error}", "give texts, numbers, lists and objects") from error
    return result


def _text_of_parts(content: object) -> object:
    """The text of a list of text parts; any other content unchanged."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _call(number: int, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        remedy = 'give {"type": "function", "function": {"name": TEXT, "arguments": OBJECT}}'
        raise UsageError(f"message {number} has a tool call without a function's name: {call!r}", remedy)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_or_none(arguments or "{}")
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        message = f"message {number} calls {name!r} with arguments {function.get('arguments')!r}"
        raise UsageError(message, "give an object, or its JSON")
    result = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return result if call.get("id") is None else {"id": str(call["id"]), **result}


def _pair_ids(messages: Sequence[dict[str, Any]]) -> None:
    """Give an id to calls without one, and to results without one that of a call of the latest turn that has calls."""
    by_id: dict[str, dict[str, Any]] = {}
    open_calls, numbers = _OpenCalls([]), count(1)
    for message in messages:
        if "tool_calls" in message:
            for call, number in zip(message["tool_calls"], numbers, strict=False):
                # Nine characters, because Mistral's templates refuse others.
                call.setdefault("id", f"call{number:05d}")
                by_id[call["id"]] = call
            open_calls = _OpenCalls(message["tool_calls"])
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            answered = open_calls.first(message.get("name")) if call_id is None else by_id.get(call_id)
            if answered is not None:
                open_calls.remove(answered)
                message.setdefault("tool_call_id", answered["id"])
                message.setdefault("name", answered["function"]["name"])


class _OpenCalls:
    """The calls of a turn that have no result yet; a client may send thousands."""

    def __init__(self, calls: Sequence[dict[str, Any]]) -> None:
        self._calls, self._by_name = deque(calls), defaultdict[str | None, deque[dict[str, Any]]](deque)
        for call in calls:
            self._by_name[call["function"]["name"]].append(call)
        self._removed: set[int] = set()

    def first(self, name: str | None) -> dict[str, Any] | None:
        """The first call of this name, or else the first one."""
        for calls in (self._by_name[name], self._calls):
            while calls and id(calls[0]) in self._removed:
                calls.popleft()
            if calls:
                return calls[0]
        return None

    def remove(self, call: dict[str, Any]) -> None:
        """Count a call as answered."""
        self._removed.add(id(call))


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    with importing("chat templates need", "jinja2"):
        from .templates import compiled  # noqa: PLC0415 - see render
    try:
        return compiled(template)
    except Exception as error:  # Python's parser has errors of its own
        message = f"the chat template of the base is invalid: {_reason(error)}"
        raise IncompatibleError(message, "use a base with a valid chat template") from error
