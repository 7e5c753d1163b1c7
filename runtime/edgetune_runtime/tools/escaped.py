"""Arguments of calls as FunctionGemma and Gemma 4 write them: names bare and sorted, each text between two marks, else
JSON.

Their templates sort names regardless of case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edgetune_runtime.decoding.output import SPACINGS
from edgetune_runtime.decoding.prompt_texts import FROM_PROMPT
from edgetune_runtime.errors import UsageError
from edgetune_runtime.type_checks import FINITE

MARKS = {"escaped": "<escape>", "quoted": '<|"|>'}
"""What is before and after a text: FunctionGemma's mark and that of Gemma 4, by the `spacing` of their formats."""
_DEPTH = 32
_NAME = re.compile(r"[^\s:,{}\[\]<>]+")
_SCALAR = re.compile(r"true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_TYPES_OF_ANY = ("string", "number", "boolean", "null")
_OBJECT = frozenset(("properties", "additionalProperties"))
"""A schema with one of these describes an object, also without `type`."""
_NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "$schema", "$defs", "definitions", FROM_PROMPT)
)
_KEYWORDS = _ANNOTATIONS.union(
    ("type", "enum", "const", "anyOf", "oneOf", "$ref", "minLength", "maxLength", "items", "minItems", "maxItems"),
    ("properties", "required", "additionalProperties", *_NUMERIC),
)


def write(value: object, mark: str) -> str:
    """The text of a value."""
    if isinstance(value, str):
        return f"{mark}{value}{mark}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{write(value[key], mark)}" for key in sorted(value, key=str.lower)) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(write(item, mark) for item in value) + "]"
    return json.dumps(value)


def read(text: str, at: int, mark: str, depth: int = 0) -> tuple[Any, int] | None:
    """The value at this place, and where it ends; None if there is none, or one that is too deep.

    ValueError for a number that is too large.
    """
    if depth > _DEPTH:
        return None
    if text.startswith(mark, at):
        end = text.find(mark, at + len(mark))
        return None if end < 0 else (text[at + len(mark) : end], end + len(mark))
    if text[at : at + 1] in ("{", "["):
        return _read_items(text, at, mark, depth)
    match = _SCALAR.match(text, at)
    return (FINITE.decode(match[0]), match.end()) if match else None


def _read_items(text: str, at: int, mark: str, depth: int) -> tuple[Any, int] | None:
    """The object or list that begins at this place."""
    close, named = {"{": ("}", True), "[": ("]", False)}[text[at]]
    items: list[tuple[str, Any]] = []
    at += 1
    while not text.startswith(close, at):
        if items:
            if not text.startswith(",", at):
                return None
            at += 1
        name = _NAME.match(text, at) if named else None
        if named:
            if name is None or not text.startswith(":", name.end()):
                return None
            at = name.end() + 1
        parsed = read(text, at, mark, depth + 1)
        if parsed is None:
            return None
        value, at = parsed
        items.append((name[0] if name else "", value))
    return dict(items) if named else [value for _, value in items], at + 1


def rules(name: str, schema: Mapping[str, Any], mark: str, literal: Callable[[str], str]) -> list[str]:
    """Rules of llguidance for values of a schema, of which the first is called `name`.

    `literal` writes a text in a rule. UsageError for a keyword that these rules cannot express, such as `pattern`, and
    for one of a wrong type.
    """
    try:
        return list(_Rules(name, schema, mark, literal).of(name, schema))
    except (TypeError, AttributeError) as error:
        raise UsageError("a schema has a keyword of the wrong type", "correct the tool's parameters") from error


class _Rules:
    """Writes the rules of one schema."""

    def __init__(self, name: str, root: Mapping[str, Any], mark: str, literal: Callable[[str], str]) -> None:
        self._prefix, self._root, self._mark, self._literal = name, root, mark, literal
        self._count = 0
        self._references: dict[str, str] = {}

    def of(self, name: str, schema: object) -> Iterator[str]:
        """The rule of this name, and those that it needs."""
        if not isinstance(schema, Mapping):
            raise _not_held(str(schema))
        if unknown := sorted(set(schema) - _KEYWORDS):
            raise _not_held(unknown[0])
        # A choice is written instead of the object, so both together would lose the properties.
        is_object = not _OBJECT.isdisjoint(schema)
        if is_object and (combined := sorted({"anyOf", "oneOf", "$ref"}.intersection(schema))):
            raise _not_held(combined[0])
        if "$ref" in schema:
            yield from self._reference(name, schema["$ref"])
        elif "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            yield f"{name}: {' | '.join(self._literal(write(value, self._mark)) for value in values)}"
        elif choices := schema.get("anyOf", schema.get("oneOf")):
            yield from self._one_of(name, choices)
        else:
            types = schema.get("type", "object" if is_object else "array" if "items" in schema else _TYPES_OF_ANY)
            if isinstance(types, str):
                yield from self._of_type(name, types, schema)
            else:
                yield from self._one_of(name, [{**schema, "type": each} for each in types])

    def _of_type(self, name: str, kind: str, schema: Mapping[str, Any]) -> Iterator[str]:
        if kind == "string":
            yield from self._text(name, schema)
        elif kind == "array":
            yield from self._list(name, schema)
        elif kind == "object":
            yield from self._object(name, schema)
        else:
            limits = {key: schema[key] for key in _NUMERIC if key in schema}
            yield f"{name}: %json {json.dumps({'type': kind, **limits, 'x-guidance': SPACINGS['compact']})}"

    def _reference(self, name: str, reference: str) -> Iterator[str]:
        if reference in self._references:
            yield f"{name}: {self._references[reference]}"
            return
        self._references[reference] = name
        target: Any = self._root
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            raise UsageError(f"a schema has $ref {reference!r}, which is not in it", "put it under $defs")
        yield from self.of(name, target)

    def _one_of(self, name: str, choices: Sequence[object]) -> Iterator[str]:
        names = [self._new() for _ in choices]
        yield f"{name}: {' | '.join(names)}"
        for each, choice in zip(names, choices, strict=True):
            yield from self.of(each, choice)

    def _text(self, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """A text up to the next mark, which may be a control token or letters."""
        shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
        mark, text, letters = self._literal(self._mark), self._new(), re.escape(self._mark)
        if mark.startswith("<["):
            yield f"{name}: {mark} {text} {mark}" if shortest else f"{name}: {mark} {text}? {mark}"
            yield rf"{text.upper()}: /(.|\n){{{max(shortest, 1)},{longest}}}/ & ~/(.|\n)*{letters}(.|\n)*/"
            yield f"{text}: {text.upper()}"
        else:
            yield f"{name}: {mark} {text}"
            yield rf"{text}[lazy]: /(.|\n){{{shortest},{longest}}}{letters}/"

    def _list(self, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        item, min_items, max_items = self._new(), schema.get("minItems", 0), schema.get("maxItems")
        more = f'("," {item}){{{max(min_items - 1, 0)},{"" if max_items is None else max(max_items - 1, 0)}}}'
        items = f"{item} {more}" if min_items else f"({item} {more})?"
        yield f'{name}: "[" {"" if max_items == 0 else items} "]"'
        yield from self.of(item, schema.get("items", {}))

    def _object(self, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """Its properties in order; `rest` are those from one on, `FIRST` if none was written before."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if unlisted := [key for key in required if key not in properties]:
            raise _not_held(unlisted[0])
        values = schema.get("additionalProperties", True)
        if not properties and values is not False:
            yield from self._map(name, {} if values is True else values)
            return
        rest = [(self._new(), self._new()) for _ in range(len(properties) + 1)]
        yield f'{name}: "{{" {rest[0][0]} "}}"'
        for number, key in enumerate(sorted(properties, key=str.lower)):
            if not _NAME.fullmatch(key):
                raise _not_held(key)
            value_name = self._new()
            for begun, rule in enumerate(rest[number]):
                text = json.dumps(f"{',' if begun else ''}{key}:", ensure_ascii=False)
                skipped = "" if key in required else f" | {rest[number + 1][begun]}"
                yield f"{rule}: {text} {value_name} {rest[number + 1][1]}{skipped}"
            yield from self.of(value_name, properties[key])
        for rule in rest[-1]:
            yield f'{rule}: ""'

    def _map(self, name: str, schema: object) -> Iterator[str]:
        """An object with any names, whose values have a schema."""
        pair, value = self._new(), self._new()
        yield f'{name}: "{{" ({pair} ("," {pair})*)? "}}"'
        yield f'{pair}: {pair.upper()} ":" {value}'
        yield f"{pair.upper()}: /{_NAME.pattern}/"
        yield from self.of(value, schema)

    def _new(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"


def _not_held(part: str) -> UsageError:
    message = f"a schema has {part[:80]!r}, which calls in the base's format cannot be held to"
    return UsageError(message, "leave it out of the tool's parameters")
