"""Chooses other values for the fields of answers: those of other rows, of the user's lists and of schemas.

A field is left as it is if it depends on one that the prompt does not say, as a name does on an id.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgetune_runtime.decoding.output import spec_of
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message
from edgetune_runtime.text.json_text import json_or_none
from edgetune_runtime.wording import first_of, suggestion

from edgetune.tasks.data import TaskRow

from .answers import NO_VALUE, FieldPath, Scalar
from .dependence import Needs, counting_fields, decided_keys, has_number, is_fixed, is_tied, selects
from .numbers import YEAR, has_result, numbers_in, order, said_numbers
from .schemas import accepts, fields_of, listed_in
from .slots import Slot, SlottedRow, has_value, mentions_of, with_values

_ENOUGH = 3
"""Values that rows with the same unsaid fields have, from which on those of other rows are not used."""
_EXCHANGED = 0.8
"""How often a value is exchanged, where there is another one."""
_UNSAID = frozenset(("none", "null", "unknown", "unset", "all", "any", "other", "default", "auto"))
"""Values of schemas that say what a prompt does not."""
_CLOCK = re.compile(
    r"\s*([ap]\.?m\b|o['\u2019]clock|(?:in the |at )?(?:morning|afternoon|evening|night)\b)", re.IGNORECASE
)
"""What is after an hour, and not after every other one."""
_CODE, _CODES = re.compile(r"[0-9]{3,6}"), 100
"""Digits that name something and count nothing, and how many others are made of them."""
_COUNTED = (re.compile(r"([01]\d|2[0-3])[0-5]\d"), re.compile(r"(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(\d\d)?"))
"""Times and dates in digits alone."""
_OF_PARTS = re.compile(r"\d[:/-]\d")
"""In times and dates."""
_DRAWS = 8
"""Attempts at another value that fits."""
Unsaid = tuple[tuple[str, str], ...]
Context = tuple[str, tuple[str, ...], Unsaid]
"""Which unsaid fields are in it, the fields that a value decides on, and the unsaid fields with their values."""


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
        by_row = [[item.answer.record(place) for place in range(len(item.answer.parts))] for item in rows]
        records = [record for own in by_row for record in own]
        # A prompt does not say what is null.
        having = Counter(field for record in records for field, value in record.items() if value != NO_VALUE)
        self._unmentioned = {field for field, count in having.items() if mentioned[field] * 2 < count}
        # The user knows better.
        open_fields = mentioned.keys() - listed.keys()
        last = [record for own in by_row for record in _last_records(own)]
        by_lists = {field for item in rows for field in _reordered_lists(item)}
        by_lists |= counting_fields(item.answer for item in rows)
        self._fixed = {field for field in open_fields if field in by_lists or is_fixed(field, self._unmentioned, last)}
        self._needs = Needs(last)
        self._decided = {field: decided_keys(field, records) for field in open_fields}
        self._tied = {
            field: {other for other in self._unmentioned if is_tied(field, other, last)} for field in open_fields
        }
        # A class that the prompt does not say, as of the code of an error, is one of its codes.
        self._free = {
            field
            for field in open_fields
            if not self._decided[field] and all(selects(other, field, records) for other in self._tied[field])
        }
        self._listed, self._schema = listed, json.dumps(schema or {})
        for field in listed:
            self._check_allowed(field, rows)
        self._is_said = {
            (item.answer.field(path), value): False for item in rows for path, value in item.answer.scalars()
        } | {(slot.field, slot.value): True for item in rows for slot in item.slots}
        self._seen: dict[tuple[str, Context], dict[Scalar, None]] = {}
        self._pools: dict[tuple[str, Context, bool], Sequence[Scalar]] = {}
        # The numbers of each field, with the tied fields of the rows that have them.
        self._numbers: dict[str, dict[float, set[Unsaid]]] = {}
        for item in rows:
            for slot in item.slots:
                near, wide = self._contexts(item, slot)
                for context in (near, wide):
                    self._seen.setdefault((slot.field, context), {})[slot.value] = None
                if not isinstance(slot.value, str):
                    self._numbers.setdefault(slot.field, {}).setdefault(slot.value, set()).add(wide[-1])

    def exchanged(self, item: SlottedRow, rng: random.Random) -> tuple[SlottedRow, list[str]] | None:
        """The row with some other values, and what was exchanged; None if there are none that fit."""
        options = {slot: choices for slot in item.slots if len(choices := self._options(item, slot)) > 1}
        chosen = [slot for slot in options if rng.random() < _EXCHANGED]
        if not chosen and options:
            chosen = [rng.choice(list(options))]
        values = {slot: slot.value for slot in item.slots}
        for slot in chosen:
            draws = (rng.choice(options[slot]) for _ in range(_DRAWS))
            values[slot] = next((new for new in draws if self._fits(new, item, slot, values)), slot.value)
        changes = [(slot, new) for slot, new in values.items() if new != slot.value]
        if not changes:
            return None
        turns = item.row.turns
        written = [_is_written(turns[place]) for place in item.answer.texts(turns)]
        said = with_values(item.said, changes, written)
        value = item.answer.with_scalars({path: new for slot, new in changes for path in slot.paths})
        row = item.answer.row(item.row, said, value)
        # A new value may also be a part of another one, or be there already.
        reread = SlottedRow.of(row, english=item.english)
        if reread is None or len(reread.slots) != len(item.slots) or _json_results(row) != _json_results(item.row):
            return None
        return reread, [f"{slot.field}: {slot.value} → {new}" for slot, new in changes]

    def _fits(self, new: Scalar, item: SlottedRow, slot: Slot, values: Mapping[Slot, Scalar]) -> bool:
        """Whether a value can take the place of that of a slot, beside these `values` of all slots.

        One that the texts have already would have two roles. Numbers keep their order, as a minimum and a maximum do,
        also among those that the answer does not have: it may be the lowest of several.
        """
        if new in values.values() or has_value(item.said, new):
            return False
        if _json_results(item.row) and (_is_escaped(new) or _is_escaped(slot.value)):
            return False
        if not accepts(self._schemas_of(item, slot.paths[0]), new):
            return False
        if any(order(slot.value, number) != order(new, number) for number in item.other_numbers):
            return False
        return all(
            other is slot or order(slot.value, other.value) == order(new, value) for other, value in values.items()
        )

    def _contexts(self, item: SlottedRow, slot: Slot) -> tuple[Context, Context]:
        """What the value of a slot may depend on: the fields that it decides on, and the unsaid ones, all or the tied.

        The fields are those of the same part of the answer. Of an hour, it is also the word after it, such as pm.
        """
        clock = _clock_after(item, slot) if has_number(slot.value) else []
        record = item.answer.record(item.answer.part_of(slot.paths[0]))
        own, tied = self._decided.get(slot.field, frozenset()), self._tied.get(slot.field, set())
        decided = (*clock, *sorted(field for field in own & record.keys() if record[field] != NO_VALUE))
        unsaid = tuple(sorted((field, str(record[field])) for field in self._unmentioned & record.keys()))
        return ("all", decided, unsaid), ("tied", decided, tuple(each for each in unsaid if each[0] in tied))

    def _options(self, item: SlottedRow, slot: Slot) -> Sequence[Scalar]:
        """The values that can take the place of that of a slot, and its own."""
        if slot.field in self._fixed or _is_followed(item, slot) or self._needs_unsaid(item, slot):
            return []
        if item.is_elsewhere(slot):
            return []
        allowed = self._listed_by_schema(item, slot)
        pool = self._pool(slot.field, self._contexts(item, slot), is_text=isinstance(slot.value, str))
        if allowed is not None:
            # A schema of a function's own is for no other.
            is_open = self._tied.get(slot.field, set()) <= {""} and not self._decided.get(slot.field)
            pool = allowed if is_open else [value for value in allowed if value in pool]
        grounds = _other_texts(item.row)
        if mentions_of(grounds, slot.value):
            if isinstance(pool, range):
                pool = [number for number in numbers_in(grounds) if number in pool]
            pool = [value for value in pool if mentions_of(grounds, value)]
        return pool

    def _needs_unsaid(self, item: SlottedRow, slot: Slot) -> bool:
        """Whether another value may need others in fields that most prompts say, but not this one."""
        if slot.field in self._listed:
            return False
        answer = item.answer
        said = {(answer.part_of(path), other.field) for other in item.slots for path in other.paths}
        for part in map(answer.part_of, slot.paths):
            having = {field for field, value in answer.record(part).items() if value != NO_VALUE}
            unsaid = {field for field in having - self._unmentioned if (part, field) not in said}
            if self._needs.may_need(slot.field, unsaid):
                return True
        return False

    def _listed_by_schema(self, item: SlottedRow, slot: Slot) -> list[Scalar] | None:
        """The values that the schemas of a slot list, as far as people say them; None if they list none."""
        allowed = listed_in(self._schemas_of(item, slot.paths[0]))
        if allowed is None:
            return None
        unsaid = {value for value in allowed if str(value).lower() in _UNSAID}
        return [value for value in allowed if self._is_said.get((slot.field, value), value not in unsaid)]

    def _pool(self, field: str, contexts: tuple[Context, Context], *, is_text: bool) -> Sequence[Scalar]:
        """The values of a field in rows with the same unsaid fields, and the given; few texts with those of more rows.

        Of codes of digits there are others too. Numbers are not those of more rows, since what is little for one
        function is much for another.
        """
        near, wide = contexts
        key = (field, near, is_text)
        if key not in self._pools:
            values = {**self._seen.get((field, near), {}), **dict.fromkeys(self._listed.get(field, ()))}
            if is_text and len(values) <= _ENOUGH:
                values |= self._seen.get((field, wide), {})
            fitting = [value for value in values if isinstance(value, str) == is_text]
            more = _codes_like(fitting) if field in self._free else []
            self._pools[key] = [*fitting, *more] if is_text else self._between(field, wide[-1], fitting)
        return self._pools[key]

    def _between(self, field: str, tied: Unsaid, numbers: Sequence[Scalar]) -> Sequence[Scalar]:
        """Those in the range of these numbers; these alone if a row with other tied fields has one in between.

        Such as where an alarm goes off below one number and above another.
        """
        found = _range(numbers)
        if isinstance(found, range) and any(
            found[0] < number < found[-1] and tied not in having
            for number, having in self._numbers.get(field, {}).items()
        ):
            return numbers
        return found

    def _schemas_of(self, item: SlottedRow, path: FieldPath) -> Sequence[Mapping[str, Any]]:
        """The schemas of a field in that of the output, or of a function: one, several of which one holds, or none."""
        schema = self._schema
        if item.row.tools is not None and item.answer.has_calls:
            called = item.answer.value[path[0]]["name"]
            schema = json.dumps(next(tool.schema for tool in item.row.tools.tools if tool.name == called))
        return fields_of(schema).get(item.answer.field(path), [])

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
                allowed = listed_in(schemas)
                message = f"data.augment.values.{field} has {value!r}, which the schema does not allow there"
                others = "other values" if allowed is None else f"one of {first_of(list(map(str, allowed)))}"
                raise UsageError(message, f"change the schema, or give {others}")


def _reordered_lists(item: SlottedRow) -> set[str]:
    """The fields that are lists of texts in another order than in the prompt, such as that of the alphabet."""
    lists: dict[FieldPath, list[tuple[int, Slot]]] = {}
    for slot in item.slots:
        for path in slot.paths:
            if isinstance(slot.value, str) and isinstance(path[-1], int):
                lists.setdefault(path[:-1], []).append((path[-1], slot))
    in_order = [[slot for _, slot in sorted(each, key=lambda placed: placed[0])] for each in lists.values()]
    return {
        one.field
        for slots in in_order
        for one, other in pairwise(slots)
        if one.mentions[0].start > other.mentions[0].start
    }


def _last_records(records: Sequence[dict[str, Scalar]]) -> list[dict[str, Scalar]]:
    """The parts of an answer without those that a later one repeats: a call that waits for its other arguments.

    What they have in common is not evidence.
    """
    return [
        one
        for place, one in enumerate(records)
        if not any(one.items() <= other.items() for other in records[place + 1 :])
    ]


def _other_texts(row: TaskRow) -> str:
    """What the model reads before the first turn: a value that is listed there is exchanged for another listed one."""
    system = [str(turn["content"]) for turn in row.turns if turn["role"] == "system"]
    return "\n".join([*system, row.tools.text if row.tools else ""])


def _is_written(turn: Message) -> bool:
    """Whether a program wrote a turn."""
    return turn["role"] == "tool" or turn["content"].lstrip()[:1] in ("{", "[")


def _clock_after(item: SlottedRow, slot: Slot) -> list[str]:
    return [match[1].lower() for mention in slot.mentions if (match := _CLOCK.match(item.said, mention.end))]


def _is_followed(item: SlottedRow, slot: Slot) -> bool:
    """Whether another value may be computed from that of a slot.

    That is one in its field that no text says: another number, or what a later turn answers, as to `undo that`. Or it
    is a number in the result of a call.
    """
    answer, is_number = item.answer, has_number(slot.value)
    place = answer.place_of(slot.paths[0])
    said = {path for other in item.slots for path in other.paths}
    unsaid = ((path, value) for path, value in answer.scalars() if path not in said)
    if any(
        answer.field(path) == slot.field and ((is_number and has_number(value)) or answer.place_of(path) > place)
        for path, value in unsaid
    ):
        return True
    results = (str(turn["content"]) for turn in item.row.turns[place:] if turn["role"] == "tool")
    return is_number and any(_may_follow(slot.value, result) for result in results)


def _may_follow(number: Scalar, result: str) -> bool:
    """Whether the result of a call may be computed from a number: a price, a difference, or a time or date."""
    numbers = result if has_value(result, number) else f"{number} {result}"
    return has_result(numbers) or any(_OF_PARTS.search(str(each)) for each in said_numbers(result) if each != number)


def _json_results(row: TaskRow) -> list[int]:
    """Where the results of calls are JSON, in which texts can be escaped."""
    results = [(place, turn["content"].lstrip()) for place, turn in enumerate(row.turns) if turn["role"] == "tool"]
    return [place for place, text in results if text[:1] in ("{", "[") and json_or_none(text) is not None]


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
            none = "no row has calls or an answer in JSON as json.dumps writes it; write them so, or remove the values"
            raise UsageError(message, suggestion(field, sorted(types)) if types else none)
        for value in values:
            if isinstance(value, str) not in types[field]:
                kind, other = ("text", "numbers") if isinstance(value, str) else ("number", "texts")
                message = f"data.augment.values.{field} has the {kind} {value!r}, and the answers have {other} there"
                raise UsageError(message, f"give {other}")


def _codes_like(texts: Sequence[Scalar]) -> list[Scalar]:
    """Other codes, such as the last digits of a card, if the texts are several of as many digits.

    Not of texts that may be times, dates, quantities or, most of them, years.
    """
    codes = [text for text in map(str, texts) if _CODE.fullmatch(text)]
    if len(codes) < max(2, len(texts)) or len({*map(len, codes)}) > 1:
        return []
    is_round = all(int(code) % 5 == 0 for code in codes)
    if (
        is_round
        or any(all(map(form.fullmatch, codes)) for form in _COUNTED)
        or 2 * len(list(filter(YEAR.fullmatch, codes))) >= len(codes)
    ):
        return []
    most = 10 ** len(codes[0])
    least = 0 if any(code.startswith("0") for code in codes) else most // 10
    return [f"{code:0{len(codes[0])}}" for code in random.Random(most).sample(range(least, most), _CODES)]


def _range(numbers: Sequence[Scalar]) -> Sequence[Scalar]:
    """Whole numbers between the smallest and the largest, in steps that all have in common; others as they are."""
    whole = [number for number in numbers if isinstance(number, int)]
    # A longer range has no length.
    if len(whole) < max(2, len(numbers)) or max(whole) - min(whole) >= sys.maxsize:
        return numbers
    return range(min(whole), max(whole) + 1, math.gcd(*(number - min(whole) for number in whole)))
