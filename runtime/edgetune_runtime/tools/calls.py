"""The tool calls of an answer: recognized in its text, and kept out of the text that is shown."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune_runtime.text.stream import TextStream, partial_length
from edgetune_runtime.type_checks import FINITE

from . import escaped
from .formats import CallFormat, Placeholder

_WORD = re.compile(r"[A-Za-z0-9_.:/-]+")
_BEGINNING = re.compile(r"\s*(<\|?tool_calls?\b|\[TOOL_CALLS\]|<start_function_call>|<function=)", re.IGNORECASE)
"""How calls of usual formats begin."""


def random_id() -> str:
    """An id for a call of a tool."""
    return uuid.uuid4().hex[:9]


def is_text_of_call(text: str) -> bool:
    """Whether a text begins as calls of usual formats do."""
    return _BEGINNING.match(text) is not None


def answer_text(content: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The answer as one text, to compare it with another: its content, or JSON with names and arguments of calls."""
    if not calls:
        return content
    listed = [{"name": name, "arguments": dict(arguments)} for name, arguments in calls]
    return json.dumps({**({"content": content} if content else {}), "tool_calls": listed}, ensure_ascii=False)


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model: `arguments` fit the tool's schema.

    `id` has nine characters. It is the model's own where the chat template has ids, and random elsewhere.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=random_id)

    def to_message(self) -> dict[str, Any]:
        """The call as an assistant's message has it in `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class CallReader:
    """Reads the calls of answers in one format. `marks` are the texts of the control tokens in it, by token.

    With the `names` of tools, an answer is either calls of these, from its beginning, or JSON. A marker that
    `is_one_token` is never cut off.
    """

    form: CallFormat
    marks: Mapping[int, bytes] = field(default_factory=dict)
    names: frozenset[str] | None = None
    is_one_token: bool = False

    def read(self, text: str, *, is_cut_off: bool = False) -> tuple[str, tuple[ToolCall, ...]]:
        """What an answer says beside its calls, and the calls; one that was cut off is not among them."""
        begin = self._begin(text, is_cut_off=is_cut_off)
        if begin is None:
            return text, ()
        calls: list[ToolCall] = []
        at: int | None = _after(text, begin, self.form.begin.lstrip())
        while at is not None:
            parsed = self._call(text, at)
            if parsed is None:
                break
            call, at = parsed
            calls.append(call)
            at = None if self.form.between is None else _after(text, at, self.form.between)
        if not calls and self.names is not None and not self.form.marker:
            return text, ()
        return text[:begin].rstrip(), tuple(calls)

    def stream(self) -> ContentStream | CallsOrJson:
        """A new stream of what an answer says beside its calls."""
        return ContentStream(self) if self.names is None else CallsOrJson(self)

    def begun_marker(self, text: str) -> int:
        """How many characters at the end of an answer that is cut off may be a part of the marker."""
        marker = self.form.marker
        return 0 if self.is_one_token or not marker else partial_length(text, (marker,))

    def _begin(self, text: str, *, is_cut_off: bool) -> int | None:
        """Where the calls begin, in an answer that is cut off maybe with a part of the marker; None if nowhere."""
        marker = self.form.marker
        if not marker:
            return 0 if text.startswith(self.form.begin[:1]) else None
        part = self.begun_marker(text) if is_cut_off else 0
        if self.names is not None:
            first = len(text) - len(text.lstrip())
            return first if text.startswith(marker, first) or first + part == len(text) > first else None
        place = text.find(marker)
        return place if place >= 0 else len(text) - part if part else None

    def _call(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        """The call at this place, and where it ends."""
        values: dict[Placeholder, Any] = {Placeholder.ID: random_id()}
        for part in self.form.parts:
            if isinstance(part, str):
                end = _after(text, at, part)
            else:
                values[part], end = _value(text, at, part, self.form.spacing)
            if end is None:
                return None
            at = end
        if self.names is not None and values[Placeholder.NAME] not in self.names:
            return None
        return ToolCall(values[Placeholder.NAME], values[Placeholder.ARGUMENTS], values[Placeholder.ID]), at


class ContentStream:
    """The pieces of an answer up to its calls, without the whitespace before them, as `CallReader` reads it."""

    def __init__(self, reader: CallReader) -> None:
        form, self._reader = reader.form, reader
        self._first = "" if form.marker else form.begin[:1]
        self._text = TextStream((form.marker,) if form.marker else ())
        self._spaces = ""
        self._has_begun = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is now known not to be a call."""
        if piece and not self._has_begun:
            self._has_begun = True
            self._text.stopped = bool(self._first) and piece.startswith(self._first)
        if self._text.stopped:
            return ""
        text = self._spaces + self._text.push(piece.encode())
        shown = text.rstrip()
        self._spaces = "" if self._text.stopped else text[len(shown) :]
        return shown

    def finish(self, *, is_cut_off: bool = False) -> str:
        """The text that was held back, after the last piece; nothing of a marker that is cut off."""
        part = self._text.finish()
        return "" if is_cut_off and part and self._reader.begun_marker(part) else self._spaces + part


class CallsOrJson:
    """The pieces of an answer that is either calls or JSON, as `CallReader` with names reads it."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader
        self._held = ""
        self._is_json = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is now known not to be a call."""
        if self._is_json:
            return piece
        self._held += piece
        begun, marker = self._held.lstrip(), self._reader.form.marker
        # Without a marker, calls are JSON too, and only the whole answer shows which it is.
        self._is_json = bool(marker and begun) and not begun.startswith(marker[: len(begun)])
        return self._held if self._is_json else ""

    def finish(self, *, is_cut_off: bool = False) -> str:
        """The text that was held back, after the last piece; nothing of a marker that is cut off."""
        return "" if self._is_json else self._reader.read(self._held, is_cut_off=is_cut_off)[0]


def _after(text: str, at: int, literal: str) -> int | None:
    return at + len(literal) if text.startswith(literal, at) else None


def _value(text: str, at: int, placeholder: Placeholder, spacing: str) -> tuple[Any, int | None]:
    if placeholder is not Placeholder.ARGUMENTS:
        match = _WORD.match(text, at)
        return (match[0], match.end()) if match else (None, None)
    try:
        if spacing in escaped.MARKS:
            value, end = escaped.read(text, at, escaped.MARKS[spacing]) or (None, at)
        else:
            value, end = FINITE.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, None
    return value, end if isinstance(value, dict) else None
