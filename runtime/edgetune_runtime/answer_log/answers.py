"""A line of a log: what was answered to a conversation, and what the answer should have been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message, messages_for
from edgetune_runtime.text.json_text import json_or_none
from edgetune_runtime.tools.calls import is_text_of_call
from edgetune_runtime.tools.definitions import tool_set
from edgetune_runtime.type_checks import dataclass_of
from edgetune_runtime.wording import shortened, suggestion

from .redaction import REDACTED

_CALLS = 'write calls as {"tool_calls": [{"name": NAME, "arguments": {…}}]}'


@dataclass(frozen=True)
class LoggedAnswer:
    """What an adapter (None: the base) of a bundle answered to `messages`, and when (ISO 8601).

    `base` is the fingerprint of the bundle's base. `correction` is the right answer, `answer` itself if someone
    confirmed it, and None if nobody said anything; with `is_wrong` someone said that `answer` is not right. With
    `is_cut_off`, `answer` is incomplete and cannot be confirmed.

    `tools` are the definitions of those that the answer could call. Calls in `answer` and `correction` are JSON, such
    as `{"tool_calls": [{"name": "turn_on", "arguments": {"room": "hall"}}]}`, with a `content` if there is one.
    """

    id: str
    time: str
    bundle: str
    base: str
    adapter: str | None
    messages: tuple[Message, ...]
    answer: str
    confidence: float | None = None
    correction: str | None = None
    is_wrong: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None
    is_cut_off: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether someone said that the answer is right or wrong."""
        return self.is_wrong or self.correction is not None

    def with_correction(self, text: str | None) -> LoggedAnswer:
        """The answer with what it should have been; None: it is right.

        UsageError as of `message_of`, for an empty text, and if it is right although it was cut off.
        """
        if text is None and self.is_cut_off:
            raise UsageError("the answer was cut off, which is not to be learned", "give the right answer")
        right = self.answer if text is None else text
        if not right.strip():
            raise UsageError("the right answer is empty, which is not to be learned", "give a text")
        self.message_of(right)
        return replace(self, correction=right, is_wrong=right != self.answer)

    def message_of(self, text: str) -> Message:
        """The assistant's message of a text as in `answer` and `correction`.

        UsageError for calls of tools in another form, for those of anything but the tools or with other arguments than
        their schemas allow, for any without tools, and for JSON with a number such as 1e999.
        """
        value = json_or_none(text)
        if isinstance(value, dict | list) and not _is_finite(value):
            infinite = f"{shortened(text, 80)!r} has a number that is not finite, which JSON cannot have"
            raise UsageError(infinite, "give a finite number")
        said: Message = {"role": "assistant", "content": text}
        if self.tools is None:
            if _has_calls(value) and not _has_calls(json_or_none(self.answer)):
                without = f"{shortened(text, 80)!r} calls tools, and the prompt had none"
                raise UsageError(without, "ask again with tools, or give a text")
            return said
        if not _has_calls(value):
            if _is_plain_json(text) and not _is_plain_json(self.answer):
                raise UsageError(f"{shortened(text, 80)!r} calls no tool", _CALLS)
            if is_text_of_call(text):
                raise UsageError(f"{shortened(text, 80)!r} is the text of a call", _CALLS)
            return said
        message = {"role": "assistant", "content": value.get("content"), "tool_calls": value["tool_calls"]}
        try:
            (turn,) = messages_for([message], None)
        except UsageError as error:
            raise UsageError(f"{shortened(text, 80)!r} has no calls of tools", _CALLS) from error
        offered = tool_set(self.tools)
        tools = {tool.name: tool for tool in offered.tools} if offered is not None else {}
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            tool = tools.get(name := function["name"])
            if tool is None:
                raise UsageError(f"{name!r} is not one of the tools", suggestion(name, [*tools]))
            function["arguments"] = tool.ordered(function["arguments"])
            # In place of what was redacted, a schema may want a number.
            if REDACTED not in text and not tool.accepts(function["arguments"]):
                raise UsageError(f"the arguments of {name} break its schema: {shortened(text, 80)!r}", "correct them")
        return turn


def line_of(entry: LoggedAnswer) -> str:
    """The line of a log for an answer."""
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"


def answer_of(raw: Any) -> LoggedAnswer:  # noqa: ANN401 - any JSON value
    """The answer of the JSON of a line. TypeError or UsageError for anything else.

    A correction that is any other JSON value than a text counts as its JSON.
    """
    names = {field.name: field.default is MISSING for field in fields(LoggedAnswer)}
    needed = [name for name, is_needed in names.items() if is_needed]
    if not isinstance(raw, dict) or not raw.keys() >= {*needed}:
        raise TypeError(f"it does not have the keys {', '.join(needed)}")
    if more := raw.keys() - names:
        raise TypeError(f"it has a key {min(more)!r}; its keys are {', '.join(names)}")
    # People write other JSON into a file of questions.
    entry = dataclass_of(LoggedAnswer, {**raw, "correction": text_of(raw.get("correction"))})
    return replace(entry, messages=tuple(messages_for(entry.messages, None)))


def text_of(correction: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """A correction as the log has it, the JSON of one that is not a text; TypeError or ValueError if it has none."""
    is_text = correction is None or isinstance(correction, str)
    return correction if is_text else json.dumps(correction, ensure_ascii=False)


def merged(entries: dict[str, LoggedAnswer], entry: LoggedAnswer) -> None:
    """Put an answer, by its id, in place of an earlier line about it, but for one that says more.

    A judged one comes last, so that the order is that of the judgements. One without a correction, such as a question
    that nobody completed, keeps the right answer of the earlier line.
    """
    if entry.is_judged:
        earlier = entries.pop(entry.id, None)
        if not entry.correction and earlier is not None and earlier.correction not in (None, earlier.answer):
            entry = replace(entry, correction=earlier.correction)
    entries.setdefault(entry.id, entry)


def _has_calls(value: object) -> bool:
    return isinstance(value, dict) and "tool_calls" in value


def _is_finite(value: object) -> bool:
    """Whether an object or a list can be written as JSON again: Python reads 1e999 as infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _is_plain_json(text: str) -> bool:
    """Whether a text is JSON without calls, or is meant to be."""
    value = json_or_none(text)
    looks_like = isinstance(value, dict | list) or text.lstrip().startswith(("{", "```"))
    return looks_like and not _has_calls(value)
