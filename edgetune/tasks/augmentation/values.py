"""Chooses other values for the fields of answers: those of other rows, of the user's lists and of schemas.

A field is left as it is if it depends on one that the prompt does not say, as a name does on an id.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import suggestion

from edgetune.tasks.data import TaskRow

from .answers import Answer, Scalar, prompt_of
from .slots import Slot, mentions_of, slots_of, with_values

_ENOUGH = 3
"""Values that rows with the same unsaid fields have, from which on those of other rows are not used."""
_EVIDENCE, _OFTEN_ALIKE, _MOSTLY_UNIQUE = 3, 0.7, 0.8
"""Pairs of rows that show a dependence; the share of all pairs above which being alike shows none; and the share of
different values that makes a field an id."""
_EXCHANGED = 0.8
"""How often a value is exchanged, where there is another one."""


@dataclass(frozen=True)
class SlottedRow:
    """A row with its answer as JSON, and the values that its prompt has too."""

    row: TaskRow
    answer: Answer
    slots: Sequence[Slot]

    @classmethod
    def of(cls, row: TaskRow) -> SlottedRow | None:
        """The row; None if its answer is plain text."""
        answer = Answer.of(row)
        return None if answer is None else cls(row, answer, slots_of(prompt_of(row), answer))


class Values:
    """The values that can take the place of others, by field.

    `given` are those of the user, `schema` that of the recipe's output. Raises UsageError for a given field that no
    answer has.
    """

    def __init__(
        self, rows: Sequence[SlottedRow], given: Mapping[str, Sequence[Scalar]], schema: Mapping[str, Any] | None
    ) -> None:
        fields = {item.answer.field(path) for item in rows for path, _ in item.answer.scalars()}
        for field in given:
            if field not in fields:
                message = f"data.augment.values has the field {field!r}, which no answer has"
                raise UsageError(message, suggestion(field, sorted(fields)))
        said = Counter(slot.field for item in rows for slot in item.slots)
        records = [item.answer.record(place) for item in rows for place in range(len(item.answer.parts))]
        having = Counter(field for record in records for field in record)
        self._unsaid = {field for field, count in having.items() if said[field] * 2 < count}
        self._fixed = {field for field in said if any(_depends(field, other, records) for other in self._unsaid)}
        self._given, self._allowed = given, {} if schema is None else dict(_enums(schema))
        self._near: dict[tuple[str, object], dict[Scalar, None]] = {}
        self._all: dict[str, dict[Scalar, None]] = {}
        for item in rows:
            for slot in item.slots:
                self._near.setdefault((slot.field, self._context(item, slot)), {})[slot.value] = None
                self._all.setdefault(slot.field, {})[slot.value] = None

    @property
    def fixed(self) -> set[str]:
        """The fields that the prompts have, but that depend on others."""
        return self._fixed

    def exchanged(self, item: SlottedRow, rng: random.Random) -> tuple[TaskRow, list[str]] | None:
        """The row with some other values, and what was exchanged; None if there are none that fit."""
        changes: list[tuple[Slot, Scalar]] = []
        options = {slot.field: found for slot in item.slots if (found := self._options(item, slot))}
        chosen = [slot for slot in item.slots if slot.field in options and rng.random() < _EXCHANGED]
        if not chosen and options:
            chosen = [rng.choice([slot for slot in item.slots if slot.field in options])]
        changes = [(slot, rng.choice(options[slot.field])) for slot in chosen]
        changes = [(slot, new) for slot, new in changes if new != slot.value]
        if not changes:
            return None
        prompt = with_values(prompt_of(item.row), changes)
        value = item.answer.with_scalars({path: new for slot, new in changes for path in slot.paths})
        row = item.answer.row(item.row, prompt, value)
        # A new value may also be a part of another one, or be there already.
        made = SlottedRow.of(row)
        if made is None or len(made.slots) != len(item.slots):
            return None
        return row, [f"{slot.field}: {slot.value} → {new}" for slot, new in changes]

    def _context(self, item: SlottedRow, slot: Slot) -> object:
        """The unsaid fields of the part of the answer that the slot is in."""
        place = slot.paths[0][0] if isinstance(item.answer.value, list) else 0
        record = item.answer.record(int(place))
        return tuple(sorted((field, str(record[field])) for field in self._unsaid & record.keys()))

    def _options(self, item: SlottedRow, slot: Slot) -> list[Scalar]:
        """The values that can take the place of that of a slot."""
        if slot.field in self._fixed:
            return []
        near = [*self._near[slot.field, self._context(item, slot)], *self._given.get(slot.field, ())]
        allowed = self._allowed_in(item, slot)
        if len(near) <= _ENOUGH:
            near += [*self._all[slot.field], *(allowed or ())]
        if not isinstance(slot.value, str):
            near += _between([value for value in near if not isinstance(value, str)])
        is_text = isinstance(slot.value, str)
        grounds = _other_texts(item.row)
        is_grounded = bool(mentions_of(grounds, slot.value))
        return [
            value
            for value in dict.fromkeys(near)
            if isinstance(value, str) == is_text
            and value != slot.value
            and (allowed is None or value in allowed)
            and (not is_grounded or mentions_of(grounds, value))
        ]

    def _allowed_in(self, item: SlottedRow, slot: Slot) -> Sequence[Scalar] | None:
        """The values that the schema of the output, or of a function, lists for a field; None if it lists none."""
        if item.row.tools is None:
            return self._allowed.get(slot.field)
        called = item.answer.value[slot.paths[0][0]]["name"]
        schema = next(tool.schema for tool in item.row.tools.tools if tool.name == called)
        return dict(_cached_enums(json.dumps(schema))).get(slot.field)


def _other_texts(row: TaskRow) -> str:
    """What the model reads besides the last turn: a value that is listed there is exchanged for another listed one."""
    turns = [str(turn["content"]) for turn in (row.messages or ())[:-1]]
    return "\n".join([*turns, row.tools.text if row.tools else ""])


def _between(numbers: Sequence[float]) -> list[int]:
    """Whole numbers between the smallest and the largest, in steps that all of them have in common."""
    if len(set(numbers)) < 2 or not all(isinstance(number, int) for number in numbers):
        return []
    whole = [int(number) for number in numbers]
    step = math.gcd(*(number - min(whole) for number in whole))
    most = 1000
    return list(range(min(whole), max(whole) + 1, step))[:most]


def _depends(field: str, other: str, records: Sequence[Mapping[str, Scalar]]) -> bool:
    """Whether the values of two fields determine one another, as far as the records show."""
    both = [(record[field], record[other]) for record in records if field in record and other in record]
    one, two = Counter(a for a, _ in both), Counter(b for _, b in both)
    alike, pairs = _pairs(Counter(both).values()), max(1, _pairs([len(both)]))
    if len(both) >= _EVIDENCE and len(two) >= _MOSTLY_UNIQUE * len(both) and alike == _pairs(one.values()):
        return True
    return any(
        _pairs(own.values()) >= _EVIDENCE
        and alike == _pairs(own.values())
        and _pairs(determined.values()) / pairs <= _OFTEN_ALIKE
        for own, determined in ((one, two), (two, one))
    )


def _pairs(counts: Iterable[int]) -> int:
    return sum(count * (count - 1) // 2 for count in counts)


@lru_cache(maxsize=64)
def _cached_enums(schema: str) -> tuple[tuple[str, Sequence[Scalar]], ...]:
    return tuple(_enums(json.loads(schema)))


def _enums(schema: Mapping[str, Any], field: str = "") -> Iterator[tuple[str, Sequence[Scalar]]]:
    """The fields whose values a JSON schema lists."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if field and values is not None:
        yield field, [value for value in values if isinstance(value, str | int | float)]
    for key, inner in schema.get("properties", {}).items():
        yield from _enums(inner, f"{field}.{key}" if field else key)
    for inner in (schema.get("items"), *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        if isinstance(inner, dict):
            yield from _enums(inner, field)
