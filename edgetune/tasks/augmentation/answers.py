"""Structured answers of a row as JSON values: their fields, and rows with other values in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.text.chat import Message

from edgetune.tasks.data import TaskRow

FieldPath = tuple[str | int, ...]
"""Keys and positions that lead to a value."""
Scalar = str | int | float
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"ensure_ascii": ascii_only, "separators": separators}
    for separators in (None, (",", ":"))
    for ascii_only in (False, True)
)


_BETWEEN_TEXTS = "\n\0\n"
"""What no value has in it."""


@dataclass(frozen=True)
class Answer:
    """The answers of a row, its conversation's earlier ones too.

    `value` is the JSON of the answer, or the list of several answers' JSON or of all calls; `styles` are how json.dumps
    writes them, none of calls, and `places` their turns.
    """

    value: Any
    places: tuple[int, ...]
    styles: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, row: TaskRow) -> Answer | None:
        """The answers; None if none is an object, a list or calls, in JSON that json.dumps would write so."""
        turns = row.turns
        if any(_BETWEEN_TEXTS.strip() in turn["content"] for turn in turns):
            return None
        calling = tuple(place for place, turn in enumerate(turns) if "tool_calls" in turn)
        if calling:
            return cls([call["function"] for place in calling for call in turns[place]["tool_calls"]], calling)
        read = {
            place: answer
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant" and (answer := _json_of(turn["content"])) is not None
        }
        if len(turns) - 1 not in read:
            return None
        values = [value for value, _ in read.values()]
        return cls(values[0] if len(values) == 1 else values, tuple(read), tuple(style for _, style in read.values()))

    @property
    def has_calls(self) -> bool:
        """Whether the answers are calls."""
        return not self.styles

    def texts(self, turns: Sequence[Message]) -> list[int]:
        """The places of the turns whose contents people or the model say, without the system prompt and the answers."""
        structured = () if self.has_calls else self.places
        return [
            place
            for place, turn in enumerate(turns)
            if turn["role"] != "system" and turn["content"] and place not in structured
        ]

    def said(self, row: TaskRow) -> str:
        """The prompt, and of a conversation all texts, in their order."""
        turns = row.turns
        return _BETWEEN_TEXTS.join(turns[place]["content"] for place in self.texts(turns))

    @property
    def parts(self) -> list[Any]:
        """The independent parts: each call, each item of a list, or the whole answer."""
        return self.value if isinstance(self.value, list) else [self.value]

    def scalars(self) -> Iterator[tuple[FieldPath, Scalar]]:
        """The texts and numbers, with their paths; of calls, those in the arguments."""
        for path, value in _scalars(self.value, ()):
            if not self.has_calls or path[1] == "arguments":
                yield path, value

    def field(self, path: FieldPath) -> str:
        """The name of a field, the same in all items of a list, such as `slots.area`."""
        keys = [key for key in path if isinstance(key, str)]
        return ".".join(keys[1:] if self.has_calls else keys)

    def record(self, place: int) -> dict[str, Scalar]:
        """The fields of one of the parts that occur once in it; "" is the function of a call."""
        by_field: dict[str, list[Scalar]] = {}
        for path, value in self.scalars():
            if not isinstance(self.value, list) or path[0] == place:
                by_field.setdefault(self.field(path), []).append(value)
        function = {"": self.value[place]["name"]} if self.has_calls else {}
        return {**{name: values[0] for name, values in by_field.items() if len(values) == 1}, **function}

    def with_scalars(self, changes: Mapping[FieldPath, Scalar]) -> Any:  # noqa: ANN401 - any JSON value
        """The value with other texts and numbers at these paths."""
        return _with_scalars(self.value, changes, ())

    def row(self, row: TaskRow, said: str, value: Any) -> TaskRow:  # noqa: ANN401 - any JSON value
        """The row with other texts, and with `value` in place of this one's."""
        turns = [dict(turn) for turn in row.turns]
        for place, text in zip(self.texts(turns), said.split(_BETWEEN_TEXTS), strict=True):
            turns[place]["content"] = text
        values = iter([value] if len(self.styles) == 1 else value)
        for place, style in zip(self.places, self.styles, strict=False):
            turns[place]["content"] = json.dumps(next(values), **style)
        for place in self.places if self.has_calls else ():
            calls = turns[place]["tool_calls"]
            turns[place]["tool_calls"] = [{**call, "function": next(values)} for call in calls]
        return row.with_turns(turns)


def prompt_of(row: TaskRow) -> str:
    """The last turn of the user before the answer; "" if another turn comes before it, or none."""
    if not row.messages or row.messages[-1]["role"] != "user":
        return ""
    return str(row.messages[-1]["content"])


def with_prompt(row: TaskRow, prompt: str) -> TaskRow:
    """The row with another last turn before its answer."""
    assert row.messages
    return row.with_turns((*row.messages[:-1], {**row.messages[-1], "content": prompt}, row.turns[-1]))


def _json_of(text: str) -> tuple[Any, Mapping[str, Any]] | None:
    """The object or list, and how json.dumps writes it as it is; None if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    style = next((style for style in _STYLES if json.dumps(value, **style) == text), None)
    return None if style is None or not isinstance(value, dict | list) else (value, style)


def _scalars(value: object, path: FieldPath) -> Iterator[tuple[FieldPath, Scalar]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _scalars(inner, (*path, place))
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, value


def _with_scalars(value: Any, changes: Mapping[FieldPath, Scalar], path: FieldPath) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, dict):
        return {key: _with_scalars(inner, changes, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_scalars(inner, changes, (*path, place)) for place, inner in enumerate(value)]
    return changes.get(path, value)
