"""Chooses other values for the fields of answers: those of other rows, of the user's lists and of schemas.

A field is left as it is if it depends on one that the prompt does not say, as a name does on an id.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edgetune_runtime.decoding.output import spec_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of, suggestion

from edgetune.tasks.data import TaskRow

from .answers import NO_VALUE, Answer, FieldPath, Scalar
from .numbers import numbers_in
from .slots import Slot, mentions_of, slots_of, with_values

_ENOUGH = 3
"""Values that rows with the same unsaid fields have, from which on those of other rows are not used."""
_EVIDENCE, _MOSTLY_UNIQUE = 3, 0.8
"""Rows that show an id, and the share of different values that makes a field one."""
_BY_CHANCE = 0.15
"""The chance that rows that are alike in one field are alike in another one, below which that shows a dependence."""
_EXCHANGED = 0.8
"""How often a value is exchanged, where there is another one."""


@dataclass(frozen=True)
class SlottedRow:
    """A row with its answers as JSON, and the values in them that a text before has too."""

    row: TaskRow
    answer: Answer
    slots: Sequence[Slot]

    @classmethod
    def of(cls, row: TaskRow) -> SlottedRow | None:
        """The row; None if its answer is plain text."""
        answer = Answer.of(row)
        if answer is None:
            return None
        slots = slots_of(answer.said(row), answer)
        return cls(row, answer, [s for s in slots if answer.is_told(row, s.paths[0], s.mentions[0].start)])


class Values:
    """The values that can take the place of others, by field.

    `listed` are those of the user, `schema` that of the recipe's output. Raises UsageError for a given field that no
    answer has, for given texts where answers have numbers or the reverse, and for a value that no schema allows.
    """

    def __init__(
        self, rows: Sequence[SlottedRow], listed: Mapping[str, Sequence[Scalar]], schema: Mapping[str, Any] | None
    ) -> None:
        _check_listed(rows, listed)
        mentioned = Counter(slot.field for item in rows for slot in item.slots)
        records = [item.answer.record(place) for item in rows for place in range(len(item.answer.parts))]
        # A prompt does not say what is null.
        having = Counter(field for record in records for field, value in record.items() if value != NO_VALUE)
        self._unmentioned = {field for field, count in having.items() if mentioned[field] * 2 < count}
        # The user knows better.
        open_fields = mentioned.keys() - listed.keys()
        self._fixed = {
            field
            for field in open_fields
            if any(_depends(field, other, records) for other in self._unmentioned)
            or _is_computed(field, self._unmentioned, records)
        }
        self._listed, self._schema = listed, json.dumps(schema or {})
        for field in listed:
            self._check_allowed(field, rows)
        self._near: dict[tuple[str, object], dict[Scalar, None]] = {}
        self._all: dict[str, dict[Scalar, None]] = {}
        self._pools: dict[tuple[str, object, bool], Sequence[Scalar]] = {}
        for item in rows:
            for slot in item.slots:
                self._near.setdefault((slot.field, self._context(item, slot)), {})[slot.value] = None
                self._all.setdefault(slot.field, {})[slot.value] = None

    def exchanged(self, item: SlottedRow, rng: random.Random) -> tuple[TaskRow, list[str]] | None:
        """The row with some other values, and what was exchanged; None if there are none that fit."""
        options = {slot: choices for slot in item.slots if len(choices := self._options(item, slot)) > 1}
        chosen = [slot for slot in options if rng.random() < _EXCHANGED]
        if not chosen and options:
            chosen = [rng.choice(list(options))]
        changes: list[tuple[Slot, Scalar]] = []
        taken = {slot.value for slot in item.slots}
        escapes = _has_json_result(item.row)
        for slot in chosen:
            new = rng.choice(options[slot])
            if new not in taken and not (escapes and (_is_escaped(new) or _is_escaped(slot.value))):
                taken.add(new)
                changes.append((slot, new))
        if not changes:
            return None
        said = with_values(item.answer.said(item.row), changes)
        value = item.answer.with_scalars({path: new for slot, new in changes for path in slot.paths})
        row = item.answer.row(item.row, said, value)
        # A new value may also be a part of another one, or be there already.
        reread = SlottedRow.of(row)
        if reread is None or len(reread.slots) != len(item.slots):
            return None
        return row, [f"{slot.field}: {slot.value} → {new}" for slot, new in changes]

    def _context(self, item: SlottedRow, slot: Slot) -> object:
        """The unsaid fields of the part of the answer that the slot is in."""
        place = slot.paths[0][0] if isinstance(item.answer.value, list) else 0
        record = item.answer.record(int(place))
        return tuple(sorted((field, str(record[field])) for field in self._unmentioned & record.keys()))

    def _options(self, item: SlottedRow, slot: Slot) -> Sequence[Scalar]:
        """The values that can take the place of that of a slot, and its own."""
        if slot.field in self._fixed:
            return []
        allowed = _enum(self._schemas_of(item, slot.paths[0]))
        pool = self._pool(slot.field, self._context(item, slot), is_text=isinstance(slot.value, str))
        if allowed is not None:
            pool = allowed
        grounds = _other_texts(item.row)
        if mentions_of(grounds, slot.value):
            if isinstance(pool, range):
                pool = [number for number in numbers_in(grounds) if number in pool]
            pool = [value for value in pool if mentions_of(grounds, value)]
        return pool

    def _pool(self, field: str, context: object, *, is_text: bool) -> Sequence[Scalar]:
        """The values of a field in rows with the same unsaid fields, in all rows where these are few, and the given."""
        key = (field, context, is_text)
        if key not in self._pools:
            near = {**self._near.get((field, context), {}), **dict.fromkeys(self._listed.get(field, ()))}
            if len(near) <= _ENOUGH:
                near |= self._all[field]
            fitting = [value for value in near if isinstance(value, str) == is_text]
            self._pools[key] = fitting if is_text else _between(fitting)
        return self._pools[key]

    def _schemas_of(self, item: SlottedRow, path: FieldPath) -> Sequence[Mapping[str, Any]]:
        """The schemas of a field in that of the output, or of a function: one, several of which one holds, or none."""
        schema = self._schema
        if item.row.tools is not None and item.answer.has_calls:
            called = item.answer.value[path[0]]["name"]
            schema = json.dumps(next(tool.schema for tool in item.row.tools.tools if tool.name == called))
        return _cached_fields(schema).get(item.answer.field(path), [])

    def _check_allowed(self, field: str, rows: Sequence[SlottedRow]) -> None:
        """UsageError for a given value that the schema of no answer allows, where all answers have one."""
        paths = [(item, path) for item in rows for path, _ in item.answer.scalars()]
        lists = [self._schemas_of(item, path) for item, path in paths if item.answer.field(path) == field]
        if not all(lists):
            return
        schemas = list({json.dumps(schema): schema for schemas in lists for schema in schemas}.values())
        specs = [spec_of(schema=schema) for schema in schemas]
        for value in self._listed[field]:
            if not any(spec.accepts(json.dumps(value, ensure_ascii=False)) for spec in specs):
                allowed = _enum(schemas)
                message = f"data.augment.values.{field} has {value!r}, which the schema does not allow there"
                others = "other values" if allowed is None else f"one of {first_of(list(map(str, allowed)))}"
                raise UsageError(message, f"change the schema, or give {others}")


def _other_texts(row: TaskRow) -> str:
    """What the model reads before the first turn: a value that is listed there is exchanged for another listed one."""
    system = [str(turn["content"]) for turn in row.turns if turn["role"] == "system"]
    return "\n".join([*system, row.tools.text if row.tools else ""])


def _has_json_result(row: TaskRow) -> bool:
    """Whether a call's result is JSON, in which texts can be escaped."""
    return any(turn["role"] == "tool" and turn["content"].lstrip()[:1] in ("{", "[") for turn in row.turns)


def _is_escaped(value: Scalar) -> bool:
    return isinstance(value, str) and json.dumps(value) != f'"{value}"'


def _check_listed(rows: Sequence[SlottedRow], listed: Mapping[str, Sequence[Scalar]]) -> None:
    types: dict[str, set[bool]] = {}
    for item in rows:
        for path, value in item.answer.scalars():
            types.setdefault(item.answer.field(path), set()).add(isinstance(value, str))
    for field, values in listed.items():
        if field not in types:
            message = f"data.augment.values has the field {field!r}, which no answer has"
            raise UsageError(message, suggestion(field, sorted(types)))
        for value in values:
            if isinstance(value, str) not in types[field]:
                kind, other = ("text", "numbers") if isinstance(value, str) else ("number", "texts")
                message = f"data.augment.values.{field} has the {kind} {value!r}, and the answers have {other} there"
                raise UsageError(message, f"give {other}")


def _between(numbers: Sequence[Scalar]) -> Sequence[Scalar]:
    """Whole numbers between the smallest and the largest, in steps that all have in common; others as they are."""
    whole = [number for number in numbers if isinstance(number, int)]
    # A longer range has no length.
    if len(whole) < max(2, len(numbers)) or max(whole) - min(whole) >= sys.maxsize:
        return numbers
    return range(min(whole), max(whole) + 1, math.gcd(*(number - min(whole) for number in whole)))


def _depends(field: str, other: str, records: Sequence[Mapping[str, Scalar]]) -> bool:
    """Whether the values of two fields determine one another, as far as the records show."""
    both = [(record[field], record[other]) for record in records if field in record and other in record]
    one, two = Counter(a for a, _ in both), Counter(b for _, b in both)
    alike, pairs = _pairs(Counter(both).values()), max(1, _pairs([len(both)]))
    if len(both) >= _EVIDENCE and len(two) >= _MOSTLY_UNIQUE * len(both) and alike == _pairs(one.values()):
        return True
    return any(
        alike == _pairs(own.values()) and (_pairs(determined.values()) / pairs) ** (len(both) - len(own)) < _BY_CHANCE
        for own, determined in ((one, two), (two, one))
    )


def _is_computed(field: str, unsaid: Iterable[str], records: Sequence[Mapping[str, Scalar]]) -> bool:
    """Whether a number may be a part of a sum or a product: an unsaid field has different numbers beside it."""
    own = [record for record in records if isinstance(record.get(field), int | float)]
    found = ({value for record in own if isinstance(value := record.get(other), int | float)} for other in unsaid)
    return any(len(values) > 1 for values in found)


def _pairs(counts: Iterable[int]) -> int:
    return sum(count * (count - 1) // 2 for count in counts)


def _enum(schemas: Sequence[Mapping[str, Any]]) -> list[Scalar] | None:
    """The values that a field's schemas list; None if there are none or one lists none."""
    lists = [schema.get("enum", [schema["const"]] if "const" in schema else None) for schema in schemas]
    if not lists or None in lists:
        return None
    return list(dict.fromkeys(v for values in lists for v in values or () if isinstance(v, str | int | float)))


@lru_cache(maxsize=64)
def _cached_fields(schema: str) -> Mapping[str, list[Mapping[str, Any]]]:
    fields: dict[str, list[Mapping[str, Any]]] = {}
    root = json.loads(schema)
    for field, own in _fields(root, root):
        fields.setdefault(field, []).append(own)
    return fields


def _fields(
    schema: Mapping[str, Any], root: Mapping[str, Any], field: str = "", refs: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas of texts, numbers and truth values in the fields; an empty one where a reference leads nowhere."""
    ref = schema.get("$ref")
    if ref is not None:
        # One that leads to itself has been read already.
        if ref not in refs:
            yield from _fields(_target(ref, root), root, field, (*refs, ref))
        return
    for key, inner in schema.get("properties", {}).items():
        yield from _fields(inner, root, f"{field}.{key}" if field else key, refs)
    parts = [schema.get("items"), *(part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ()))]
    for inner in parts:
        if isinstance(inner, dict):
            yield from _fields(inner, root, field, refs)
    if field and not any(parts) and schema.get("type") not in ("object", "array", "null"):
        yield field, {} if '"$ref"' in json.dumps(schema) else schema


def _target(ref: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference within the schema leads to; an empty schema if that is not in it."""
    found: Any = root if ref.startswith("#") else {}
    for key in ref.split("/")[1:]:
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}
