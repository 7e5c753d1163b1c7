"""Structured answers of a row as JSON values: their fields, and rows with other values in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.text.chat import Message
from edgetune_runtime.text.json_text import json_or_none

from edgetune.tasks.data import TaskRow

from .numbers import said_numbers

FieldPath = tuple[str | int, ...]
"""Keys and positions that lead to a value."""
Scalar = str | int | float
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"ensure_ascii": ascii_only, "separators": separators, "indent": indent}
    for indent in (None, 2, 4, 1)
    for separators in (None, (",", ":"))
    for ascii_only in (False, True)
)
_TOKEN = re.compile(r"\w+|[^\w\s]")
NO_VALUE = "[null]"
"""What a record has for null."""
BETWEEN_TEXTS = "\0"
"""What no value has in it."""


@dataclass(frozen=True)
class Answer:
    """The structured answers of a row, its conversation's earlier ones too.

    `value` is the JSON of the answer, the list of several answers' objects, or the list of all calls. `places` are the
    turns of its parts, of one answer only that of the whole. `styles` are how json.dumps writes answers in JSON; calls
    have none.
    """

    value: Any
    places: tuple[int, ...]
    styles: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, row: TaskRow) -> Answer | None:
        """The answers; None without a call, if the last one is not an object or list that json.dumps would write so."""
        turns = row.turns
        if any(BETWEEN_TEXTS in turn["content"] for turn in turns):
            return None
        calls = [(place, call) for place, turn in enumerate(turns) for call in turn.get("tool_calls", ())]
        if calls:
            return cls([call["function"] for _, call in calls], tuple(place for place, _ in calls))
        read = {
            place: answer
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant" and (answer := _json_of(turn["content"])) is not None
        }
        values, styles = [value for value, _ in read.values()], tuple(style for _, style in read.values())
        if len(turns) - 1 not in read or (len(values) > 1 and not all(isinstance(value, dict) for value in values)):
            return None
        return cls(values[0] if len(values) == 1 else values, tuple(read), styles)

    @property
    def has_calls(self) -> bool:
        """Whether the answers are calls."""
        return not self.styles

    def texts(self, turns: Sequence[Message]) -> list[int]:
        """The places of the turns whose contents are texts: without the system prompt and the answers in JSON."""
        in_json = () if self.has_calls else self.places
        return [
            place
            for place, turn in enumerate(turns)
            if turn["role"] != "system" and turn["content"] and place not in in_json
        ]

    def said(self, row: TaskRow) -> str:
        """The prompt, and of a conversation all texts, in their order."""
        turns = row.turns
        return BETWEEN_TEXTS.join(turns[place]["content"] for place in self.texts(turns))

    def is_told(self, row: TaskRow, path: FieldPath, mention: int) -> bool:
        """Whether the text at this place of `said` comes before the turn that has the value."""
        text = self.said(row).count(BETWEEN_TEXTS, 0, mention)
        return self.texts(row.turns)[text] < self.place_of(path)

    def place_of(self, path: FieldPath) -> int:
        """The turn that has the value."""
        return self.places[int(path[0]) if len(self.places) > 1 else 0]

    @property
    def parts(self) -> list[Any]:
        """The independent parts: each call, each item of a list, or the whole answer."""
        return self.value if isinstance(self.value, list) else [self.value]

    def part_of(self, path: FieldPath) -> int:
        """The place of the part that has this path."""
        return int(path[0]) if isinstance(self.value, list) else 0

    def scalars(self) -> Iterator[tuple[FieldPath, Scalar]]:
        """The texts and numbers, with their paths; of calls, those in the arguments."""
        for path, value in _leaves(self.value, ()):
            if _is_scalar(value) and (not self.has_calls or path[1] == "arguments"):
                yield path, value

    def field(self, path: FieldPath) -> str:
        """The name of a field, the same in all items of a list, such as `slots.area`."""
        keys = [key for key in path if isinstance(key, str)]
        return ".".join(keys[1:] if self.has_calls else keys)

    def record(self, place: int) -> dict[str, Scalar]:
        """The fields of one of the parts, with JSON for what is not text or a number; "" is the function of a call."""
        by_field: dict[str, list[Any]] = {}
        for path, value in _leaves(self.value, ()):
            is_own = not isinstance(self.value, list) or path[0] == place
            if is_own and (not self.has_calls or path[1] == "arguments"):
                by_field.setdefault(self.field(path), []).append(value)
        function = {"": self.value[place]["name"]} if self.has_calls else {}
        return {**{name: _of_field(values) for name, values in by_field.items()}, **function}

    def has_offsets(self, prompt: str, least_word: int = 0) -> bool:
        """Whether a number is where a text of the answer begins in the prompt, and another one its end or its length.

        They count characters, or words if the prompt does not say them and one of them is `least_word` or more. Most
        changes of the prompt make them wrong.
        """
        values, said = [value for _, value in self.scalars()], _lower(prompt)
        texts = {_lower(value) for value in values if isinstance(value, str) and value}
        numbers = Counter(value for value in values if isinstance(value, int) and value >= 0)
        told = {str(number) for number in said_numbers(said)}
        untold = Counter({number: count for number, count in numbers.items() if str(number) not in told})
        # Programs count characters, units of UTF-16 or bytes.
        return any(_has_places(form(said), map(form, texts), numbers) for form in (str, _in_utf16, _in_utf8)) or any(
            _has_places(split(said), map(split, texts), untold, least_word) for split in (str.split, _TOKEN.findall)
        )

    def with_scalars(self, changes: Mapping[FieldPath, Scalar]) -> Any:  # noqa: ANN401 - any JSON value
        """The value with other texts and numbers at these paths."""
        return _with_scalars(self.value, changes, ())

    def row(self, row: TaskRow, said: str, value: Any) -> TaskRow:  # noqa: ANN401 - any JSON value
        """The row with other texts, and with `value` in place of this one's."""
        turns = [dict(turn) for turn in row.turns]
        for place, text in zip(self.texts(turns), said.split(BETWEEN_TEXTS), strict=True):
            turns[place]["content"] = text
        if self.has_calls:
            functions = iter(value)
            for place in dict.fromkeys(self.places):
                calls = turns[place]["tool_calls"]
                turns[place]["tool_calls"] = [{**call, "function": next(functions)} for call in calls]
            return row.with_turns(turns)
        values = [value] if len(self.places) == 1 else value
        for place, style, answer in zip(self.places, self.styles, values, strict=True):
            text = turns[place]["content"]
            turns[place]["content"] = text.replace(text.strip(), json.dumps(answer, **style))
        return row.with_turns(turns)


def _has_places(said: Sequence[str], texts: Iterable[Sequence[str]], numbers: Counter[int], least: int = 0) -> bool:
    """Whether one of the numbers is the place of a text in `said`, and another one its end or its length."""
    return any(
        any(
            numbers[other] > (other == start) and max(start, other) >= least
            for other in (start + len(text), start + len(text) - 1, len(text))
        )
        for text in texts
        for start in numbers
        if text and said[start : start + len(text)] == text
    )


def _lower(text: str) -> str:
    """The text in lower case, with as many characters: that of some letters, such as İ, has two."""
    return "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)


def _in_utf16(text: str) -> str:
    """A text with a character per unit of UTF-16: two for an emoji."""
    return re.sub("[\U00010000-\U0010ffff]", r"\g<0>\0", text)


def _in_utf8(text: str) -> str:
    """A text with a character per byte."""
    return text.encode(errors="replace").decode("latin-1")


def prompt_of(row: TaskRow) -> str:
    """The last turn of the user before the answer; "" if another turn comes before it, or none."""
    return row.prompt if row.messages and row.messages[-1]["role"] == "user" else ""


def _json_of(text: str) -> tuple[Any, Mapping[str, Any]] | None:
    """The object or list, and how json.dumps writes it, without white space around it; None if it is something else."""
    text = text.strip()
    value = json_or_none(text)
    if not isinstance(value, dict | list):
        return None
    style = next((style for style in _STYLES if json.dumps(value, **style) == text), None)
    return None if style is None else (value, style)


def _leaves(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:  # noqa: ANN401 - any JSON value
    """The values that have no others in them, with their paths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    else:
        yield path, value


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _of_field(values: Sequence[Any]) -> Scalar:
    """The only text or number of a field, or the JSON of its values."""
    only: Scalar = values[0]
    return only if len(values) == 1 and _is_scalar(only) else json.dumps(values)


def _with_scalars(value: Any, changes: Mapping[FieldPath, Scalar], path: FieldPath) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, dict):
        return {key: _with_scalars(inner, changes, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_scalars(inner, changes, (*path, place)) for place, inner in enumerate(value)]
    return changes.get(path, value)
