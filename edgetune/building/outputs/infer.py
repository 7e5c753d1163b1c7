"""Infers the output constraint that all training answers satisfy: a JSON schema, or a list of choices.

Strings become an enum only where the rows suggest that they know all of its values, and texts of the prompt only where
the rows suggest that new values are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.decoding.prompt_texts import FROM_PROMPT, texts_in
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.json_text import is_deeper, json_or_none, leaves
from edgetune_runtime.tools.formats import SEPARATORS
from edgetune_runtime.wording import shortened

from edgetune.common.choices import MAX_CHOICES, is_complete
from edgetune.tasks.data import COPY, EARLIER_ANSWER, TaskRow

MOST_LEVELS = 50
"""Of lists and objects in an answer: llguidance takes schemas of about 64."""
_ESCAPE = r"\u"
_PART = re.compile(rf"(?:{COPY}|{EARLIER_ANSWER})[0-9]+")
_ENOUGH = 30
"""Values of one row at one place, or at all places, from which it shows whether new values are from the prompt."""
_MOSTLY = 0.9
"""Share of the values of one row, at all places, that are in their prompts, if a place of fewer is thought to be alike.
"""
_RARELY = 0.2
"""Share of a place's values that may not be in their prompts: others are made of what the prompt says."""
_WRONG = 0.02
"""Share of a place's values of one row that may not be in their prompts, as some rows are wrong."""


def infer(answers: Sequence[str], rows: Sequence[TaskRow] | None = None) -> OutputSpec | None:
    """The constraint that these answers suggest; None for free text. UsageError for one of more than 50 levels.

    Strings may be texts of the prompt only if the `rows` of the answers are given.
    """
    parsed = [json_or_none(answer) for answer in answers]
    if parsed and all(isinstance(value, dict | list) for value in parsed):
        shape = _Shape()
        for place, (answer, value) in enumerate(zip(answers, parsed, strict=True)):
            if is_deeper(value, MOST_LEVELS):
                message = f"answer {shortened(answer)!r} has more than {MOST_LEVELS} levels of lists and objects"
                raise UsageError(message, "use fewer, or no `output: auto`")
            shape.add(value, _Seen() if rows is None else _Seen.in_row(rows[place]))
        return output_of(schema=shape.schema(shape.is_extraction), spacing=spacing_of(answers))
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


@dataclass(frozen=True)
class _Seen:
    """Where an answer was seen: the row, which copies and answers of one conversation share, and the prompt's texts."""

    row: str = ""
    texts: Mapping[str, None] = field(default_factory=dict)

    @classmethod
    def in_row(cls, row: TaskRow) -> _Seen:
        # A constraint writes texts of the prompt as they are, without escapes of letters.
        texts = {} if _ESCAPE in (row.completion or "") else texts_in(row.said)
        return cls(_PART.split(row.where)[0], texts)


@dataclass
class _Shape:
    """What was seen at one place of the answers."""

    kinds: Counter[str] = field(default_factory=Counter)
    strings: Counter[str] = field(default_factory=Counter)
    unsaid: Counter[str] = field(default_factory=Counter)
    only_row: dict[str, str | None] = field(default_factory=dict)
    properties: dict[str, _Shape] = field(default_factory=dict)
    present: Counter[str] = field(default_factory=Counter)
    before: dict[str, dict[str, None]] = field(default_factory=dict)
    items: _Shape | None = None
    is_empty_seen: bool = False

    def add(self, value: Any, seen: _Seen) -> None:  # noqa: ANN401 - any JSON value
        """Take one more value into account."""
        kind = _KINDS[type(value)]
        self.kinds[kind] += 1
        if isinstance(value, str):
            self.strings[value] += 1
            if value not in seen.texts:
                self.unsaid[value] += 1
            self.only_row[value] = seen.row if self.only_row.get(value, seen.row) == seen.row else None
        elif isinstance(value, dict):
            self._add_object(value, seen)
        elif isinstance(value, list):
            self.items = self.items or _Shape()
            self.is_empty_seen = self.is_empty_seen or not value
            for item in value:
                self.items.add(item, seen)

    @property
    def is_extraction(self) -> bool:
        """Whether nearly all strings that one row has, here and below, are in their prompts."""
        shapes = list(self._shapes())
        single = sum(len(shape._of_one_row) for shape in shapes)
        said = sum(len(shape._of_one_row - shape.unsaid.keys()) for shape in shapes)
        return single >= _ENOUGH and said >= _MOSTLY * single

    def schema(self, is_extraction: bool) -> dict[str, Any]:
        """The JSON schema of all values; `is_extraction` is that of all places."""
        kinds = set(self.kinds) - ({"integer"} if "number" in self.kinds else set())
        options = [option for kind in sorted(kinds) for option in self._of_kind(kind, is_extraction)]
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _shapes(self) -> Iterator[_Shape]:
        yield self
        for shape in (*self.properties.values(), *([self.items] if self.items else [])):
            yield from shape._shapes()

    @property
    def _of_one_row(self) -> set[str]:
        return {value for value, row in self.only_row.items() if row is not None}

    def _add_object(self, value: dict[str, Any], seen: _Seen) -> None:
        # Not sets, whose order differs from process to process.
        previous: dict[str, None] = {}
        for key, item in value.items():
            self.properties.setdefault(key, _Shape()).add(item, seen)
            self.present[key] += 1
            self.before.setdefault(key, {}).update(previous)
            previous = {key: None}

    def _of_kind(self, kind: str, is_extraction: bool) -> list[dict[str, Any]]:
        """The schemas of this kind's values, of which one is enough."""
        if kind == "string":
            return self._string(is_extraction)
        if kind == "array":
            assert self.items is not None
            items = {"items": self.items.schema(is_extraction)} if self.items.kinds else {"maxItems": 0}
            return [{"type": kind, **items, **({} if self.is_empty_seen else {"minItems": 1})}]
        return [self._object(is_extraction) if kind == "object" else {"type": kind}]

    def _string(self, is_extraction: bool) -> list[dict[str, Any]]:
        if is_complete(self.strings):
            return [{"enum": sorted(self.strings)}]
        if not self._is_from_prompt(is_extraction):
            return [{"type": "string"}]
        # A prompt may misspell a value that is known.
        known = self.strings if len(self.strings) <= MAX_CHOICES else self.unsaid
        return [*([{"enum": sorted(known)}] if known else []), {"type": "string", FROM_PROMPT: True}]

    def _is_from_prompt(self, is_extraction: bool) -> bool:
        """Whether strings that were not seen are probably texts of the prompt, as those are that one row has."""
        single, unsaid = self._of_one_row, self.unsaid
        if len(single & unsaid.keys()) > _WRONG * len(single) or len(unsaid) > MAX_CHOICES:
            return False
        if unsaid.total() > _RARELY * self.strings.total():
            return False
        return len(single) >= _ENOUGH or (is_extraction and not unsaid)

    def _object(self, is_extraction: bool) -> dict[str, Any]:
        """Keys come in the order of the schema, so this one needs an order that all rows agree with."""
        order = self._order()
        required = [key for key in order or sorted(self.present) if self.present[key] == self.kinds["object"]]
        if order is not None:
            properties = {key: self.properties[key].schema(is_extraction) for key in order}
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        schemas = {key: shape.schema(is_extraction) for key, shape in sorted(self.properties.items())}
        patterns = {f"^{_escaped(key)}$": schema for key, schema in schemas.items()}
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
    """The key as a regular expression that JSON Schema and Rust read alike: Rust refuses escapes of other signs."""
    return re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", key)


def rejected(spec: OutputSpec, answers: Iterable[str]) -> list[int]:
    """Positions of the answers that the constraint rejects for any prompt."""
    return [place for place, answer in enumerate(answers) if not spec.accepts(answer)]


def problem_of(spec: OutputSpec, row: TaskRow) -> str | None:
    """How the row's answer breaks the recipe's constraint on answers to its prompt."""
    answer = row.completion or ""
    if not spec.accepts(answer):
        return f"breaks the {spec.kind} of the recipe"
    texts = spec.for_prompt(row.said).texts
    if not texts:
        return None
    # Those that the answer does not have make no difference, but for the time that all of them take.
    own = _strings(json_or_none(answer))
    if spec.with_texts([text for text in texts if text in own] or texts[:1]).accepts(answer):
        return None
    if _ESCAPE in answer:
        return rf"writes a text of the prompt with {_ESCAPE} escapes, where {FROM_PROMPT} is true"
    return f"has a text that its prompt lacks, where {FROM_PROMPT} is true"


def unsaid_strings(row: TaskRow) -> set[str]:
    """The strings of an answer in JSON that are no texts of its prompt."""
    return _strings(json_or_none(row.completion or "")) - _Seen.in_row(row).texts.keys()


def _strings(value: object) -> set[str]:
    return {leaf for leaf in leaves(value) if isinstance(leaf, str)}
