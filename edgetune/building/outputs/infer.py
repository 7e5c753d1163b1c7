"""Infers the output constraint that all training answers satisfy: a JSON schema, or a list of choices.

Strings become an enum only where the rows suggest that they know all of its values, and texts of the prompt only where
the rows suggest that new values are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from edgetune_runtime.decoding.output import OutputSpec, output_of
from edgetune_runtime.decoding.prompt_texts import FROM_PROMPT, texts_in
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.json_text import is_deeper, json_or_none
from edgetune_runtime.tools.formats import SEPARATORS
from edgetune_runtime.wording import shortened

from edgetune.common.choices import MAX_CHOICES, is_complete
from edgetune.tasks.data import TaskRow

MOST_LEVELS = 50
"""Of lists and objects in an answer: llguidance takes schemas of about 64."""
_ENOUGH, _ENOUGH_IN_ALL = 10, 20
"""Values seen once at one place, or at all places, from which it shows whether new values are from the prompt."""
_MOSTLY = 0.9
"""Share of the values seen once at all places that are in their prompts, if a place of fewer is thought to be alike."""
_RARELY = 0.2
"""Share of a place's values that may not be in their prompts: others are made of what the prompt says."""


def infer(answers: Sequence[str], prompts: Sequence[Sequence[str]] | None = None) -> OutputSpec | None:
    """The constraint that these answers suggest; None for free text. UsageError for one of more than 50 levels.

    Strings may be texts of the prompt only if `prompts` are given, the messages before each answer.
    """
    parsed = [json_or_none(answer) for answer in answers]
    if parsed and all(isinstance(value, dict | list) for value in parsed):
        shape = _Shape()
        for place, (answer, value) in enumerate(zip(answers, parsed, strict=True)):
            if is_deeper(value, MOST_LEVELS):
                message = f"answer {shortened(answer)!r} has more than {MOST_LEVELS} levels of lists and objects"
                raise UsageError(message, "use fewer, or no `output: auto`")
            # A constraint writes texts of the prompt as they are, without escapes of letters.
            shape.add(value, () if prompts is None or r"\u" in answer else texts_in(prompts[place]))
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


@dataclass
class _Shape:
    """What was seen at one place of the answers."""

    kinds: Counter[str] = field(default_factory=Counter)
    strings: Counter[str] = field(default_factory=Counter)
    unsaid: Counter[str] = field(default_factory=Counter)
    properties: dict[str, _Shape] = field(default_factory=dict)
    present: Counter[str] = field(default_factory=Counter)
    before: dict[str, dict[str, None]] = field(default_factory=dict)
    items: _Shape | None = None
    is_empty_seen: bool = False

    def add(self, value: Any, texts: Collection[str]) -> None:  # noqa: ANN401 - any JSON value
        """Take one more value into account, of an answer to a prompt with these texts."""
        kind = _KINDS[type(value)]
        self.kinds[kind] += 1
        if isinstance(value, str):
            self.strings[value] += 1
            self.unsaid[value] += value not in texts
        elif isinstance(value, dict):
            self._add_object(value, texts)
        elif isinstance(value, list):
            self.items = self.items or _Shape()
            self.is_empty_seen = self.is_empty_seen or not value
            for item in value:
                self.items.add(item, texts)

    @property
    def is_extraction(self) -> bool:
        """Whether nearly all strings that were seen once, here and below, are in their prompts."""
        shapes = list(self._shapes())
        once = sum(len(shape._seen_once) for shape in shapes)
        said = sum(len(shape._seen_once - shape._unsaid) for shape in shapes)
        return once >= _ENOUGH_IN_ALL and said >= _MOSTLY * once

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
    def _seen_once(self) -> set[str]:
        return {value for value, count in self.strings.items() if count == 1}

    @property
    def _unsaid(self) -> set[str]:
        """The values that a row has whose prompt lacks them."""
        return {value for value, count in self.unsaid.items() if count}

    def _add_object(self, value: dict[str, Any], texts: Collection[str]) -> None:
        # Not sets, whose order differs from process to process.
        previous: dict[str, None] = {}
        for key, item in value.items():
            self.properties.setdefault(key, _Shape()).add(item, texts)
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
        known = self.strings if len(self.strings) <= MAX_CHOICES else self._unsaid
        return [*([{"enum": sorted(known)}] if known else []), {"type": "string", FROM_PROMPT: True}]

    def _is_from_prompt(self, is_extraction: bool) -> bool:
        """Whether strings that were not seen are probably texts of the prompt, as all are that were seen once."""
        if self._unsaid & self._seen_once:
            return False
        is_rare = self.unsaid.total() <= _RARELY * self.strings.total() and len(self._unsaid) <= MAX_CHOICES
        return is_rare and (is_extraction or len(self._seen_once) >= _ENOUGH)

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
    """The key as a regular expression that JSON Schema and Rust read alike."""
    return "".join(character if character.isalnum() or character in "_ " else f"\\{character}" for character in key)


def rejected(spec: OutputSpec, answers: Iterable[str]) -> list[int]:
    """Positions of the answers that the constraint rejects for any prompt."""
    return [place for place, answer in enumerate(answers) if not spec.accepts(answer)]


def problem_of(spec: OutputSpec, row: TaskRow) -> str | None:
    """How the row's answer breaks the recipe's constraint on answers to its prompt."""
    answer = row.completion or ""
    if spec.for_prompt(row.said).accepts(answer):
        return None
    if spec.accepts(answer):
        return f"has a text that its prompt lacks, where {FROM_PROMPT} is true"
    return f"breaks the {spec.kind} of the recipe"
