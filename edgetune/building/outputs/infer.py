"""Infers the output constraint that all training answers satisfy: a JSON schema, or a list of choices.

Strings become an enum only where the rows suggest that they know all of its values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.json_text import is_deeper, json_or_none
from edgetune_runtime.tools.formats import SEPARATORS
from edgetune_runtime.wording import shortened

from edgetune.common.choices import is_complete

MOST_LEVELS = 50
"""Of lists and objects in an answer: llguidance takes schemas of about 64."""


def infer(answers: Sequence[str]) -> OutputSpec | None:
    """The constraint that these answers suggest; None for free text. UsageError for one of more than 50 levels."""
    parsed = [json_or_none(answer) for answer in answers]
    if parsed and all(isinstance(value, dict | list) for value in parsed):
        shape = _Shape()
        for answer, value in zip(answers, parsed, strict=True):
            if is_deeper(value, MOST_LEVELS):
                message = f"answer {shortened(answer)!r} has more than {MOST_LEVELS} levels of lists and objects"
                raise UsageError(message, "use fewer, or no `output: auto`")
            shape.add(value)
        return output_of(schema=shape.schema(), spacing=spacing_of(answers))
    values = Counter(answers)
    return output_of(choices=sorted(values)) if is_complete(values) else None


def spacing_of(answers: Sequence[str]) -> str:
    """How all answers separate the parts of their JSON: one of the runtime's SPACINGS."""
    pairs = [(answer, json_or_none(answer)) for answer in answers]
    for name, separators in SEPARATORS.items():
        if all(answer in _written(value, separators) for answer, value in pairs):
            return name
    return "any"


def _written(value: object, separators: tuple[str, str]) -> tuple[str, str]:
    return (
        json.dumps(value, separators=separators, ensure_ascii=False),
        json.dumps(value, separators=separators),
    )


@dataclass
class _Shape:
    """What was seen at one place of the answers."""

    kinds: Counter[str] = field(default_factory=Counter)
    strings: Counter[str] = field(default_factory=Counter)
    properties: dict[str, _Shape] = field(default_factory=dict)
    present: Counter[str] = field(default_factory=Counter)
    before: dict[str, dict[str, None]] = field(default_factory=dict)
    items: _Shape | None = None
    is_empty_seen: bool = False

    def add(self, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Take one more value into account."""
        kind = _KINDS[type(value)]
        self.kinds[kind] += 1
        if isinstance(value, str):
            self.strings[value] += 1
        elif isinstance(value, dict):
            self._add_object(value)
        elif isinstance(value, list):
            self.items = self.items or _Shape()
            self.is_empty_seen = self.is_empty_seen or not value
            for item in value:
                self.items.add(item)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of all values."""
        kinds = set(self.kinds) - ({"integer"} if "number" in self.kinds else set())
        options = [self._of_kind(kind) for kind in sorted(kinds)]
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _add_object(self, value: dict[str, Any]) -> None:
        # Not sets, whose order differs from process to process.
        previous: dict[str, None] = {}
        for key, item in value.items():
            self.properties.setdefault(key, _Shape()).add(item)
            self.present[key] += 1
            self.before.setdefault(key, {}).update(previous)
            previous = {key: None}

    def _of_kind(self, kind: str) -> dict[str, Any]:
        if kind == "string" and is_complete(self.strings):
            return {"enum": sorted(self.strings)}
        if kind == "array":
            assert self.items is not None
            items = {"items": self.items.schema()} if self.items.kinds else {"maxItems": 0}
            return {"type": kind, **items, **({} if self.is_empty_seen else {"minItems": 1})}
        return self._object() if kind == "object" else {"type": kind}

    def _object(self) -> dict[str, Any]:
        """Keys come in the order of the schema, so this one needs an order that all rows agree with."""
        order = self._order()
        required = [key for key in order or sorted(self.present) if self.present[key] == self.kinds["object"]]
        if order is not None:
            properties = {key: self.properties[key].schema() for key in order}
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        patterns = {f"^{_escaped(key)}$": shape.schema() for key, shape in sorted(self.properties.items())}
        limits = {"minProperties": len(required), "maxProperties": len(self.properties)}
        return {"type": "object", "patternProperties": patterns, "additionalProperties": False, **limits}

    def _order(self) -> list[str] | None:
        """The keys in an order that no row contradicts; None if there is none."""
        try:
            return list(TopologicalSorter(self.before).static_order())
        except CycleError:
            return None


_KINDS = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}


def _escaped(key: str) -> str:
    """The key as a regular expression that JSON Schema and Rust read alike."""
    return "".join(character if character.isalnum() or character in "_ " else f"\\{character}" for character in key)


def rejected(spec: OutputSpec, answers: Iterable[str]) -> list[int]:
    """Positions of the answers that the constraint rejects."""
    return [place for place, answer in enumerate(answers) if not spec.accepts(answer)]
