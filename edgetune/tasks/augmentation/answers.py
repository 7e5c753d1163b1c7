"""Answers as JSON values: their fields, and rows with other values in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgetune.tasks.data import TaskRow, answer_text

FieldPath = tuple[str | int, ...]
"""Keys and positions that lead to a value."""
Scalar = str | int | float
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"ensure_ascii": ascii_only, "separators": separators}
    for separators in (None, (",", ":"))
    for ascii_only in (False, True)
)


@dataclass(frozen=True)
class Answer:
    """The answer of a row: `value` is its JSON, or the list of its calls; `style` is how json.dumps writes it."""

    value: Any
    style: Mapping[str, Any]
    has_calls: bool = False

    @classmethod
    def of(cls, row: TaskRow) -> Answer | None:
        """The answer; None for one that is no object, list or calls, or JSON that json.dumps would write otherwise."""
        if row.turn is not None:
            return cls([call["function"] for call in row.turn["tool_calls"]], {}, has_calls=True)
        try:
            value = json.loads(row.completion or "")
        except (ValueError, RecursionError):
            return None
        style = next((style for style in _STYLES if json.dumps(value, **style) == row.completion), None)
        return None if style is None or not isinstance(value, dict | list) else cls(value, style)

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

    def row(self, row: TaskRow, prompt: str, value: Any) -> TaskRow:  # noqa: ANN401 - any JSON value
        """The row with another last turn of the user, and with `value` in place of this one's."""
        changed = with_prompt(row, prompt)
        if row.turn is None:
            return replace(changed, completion=json.dumps(value, **self.style))
        tool_calls = [
            {**call, "function": function} for call, function in zip(row.turn["tool_calls"], value, strict=True)
        ]
        calls = [(function["name"], function["arguments"]) for function in value]
        return replace(
            changed, completion=answer_text(row.turn["content"], calls), turn={**row.turn, "tool_calls": tool_calls}
        )


def prompt_of(row: TaskRow) -> str:
    """The last turn of the user before the answer; "" if another turn comes before it, or none."""
    if not row.messages or row.messages[-1]["role"] != "user":
        return ""
    return str(row.messages[-1]["content"])


def with_prompt(row: TaskRow, prompt: str) -> TaskRow:
    """The row with another last turn before its answer."""
    assert row.messages
    return replace(row, messages=(*row.messages[:-1], {**row.messages[-1], "content": prompt}))


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
