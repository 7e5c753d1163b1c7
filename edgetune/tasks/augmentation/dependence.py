"""Finds the fields of answers whose values others decide, as far as the rows show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from .answers import NO_VALUE, Answer, Scalar

Record = Mapping[str, Scalar]
_EVIDENCE, _MOSTLY_UNIQUE = 3, 0.8
"""Rows that show an id, and the share of different values that makes a field one."""
_BY_CHANCE = 0.15
"""The chance that rows that are alike in one field are alike in another one, below which that shows a dependence."""


def is_fixed(field: str, unsaid: Collection[str], records: Sequence[Record]) -> bool:
    """Whether another value of the field would need others in fields that no prompt says."""
    return any(_depends(field, other, records) for other in unsaid) or _is_computed(field, unsaid, records)


class Needs:
    """Tells what other values of fields may need, as far as these records show; what they show of two is kept."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._depends = cache(lambda field, other: _depends(field, other, records) or is_tied(field, other, records))
        self._has_numbers = cache(partial(_has_numbers, records=records))
        self._names = cache(partial(_names, records=records))

    def may_need(self, field: str, others: Collection[str]) -> bool:
        """Whether another value of the field would need others in these fields, or nothing shows that it would not."""
        return any(
            self._depends(field, other) or (self._has_numbers(field, other) and self._names(other) <= {*others})
            for other in others
        )


def _depends(field: str, other: str, records: Sequence[Record]) -> bool:
    """Whether the values of two fields determine one another."""
    both = [(record[field], record[other]) for record in records if field in record and other in record]
    one, two = Counter(a for a, _ in both), Counter(b for _, b in both)
    is_id = len(both) >= _EVIDENCE and len(two) >= _MOSTLY_UNIQUE * len(both)
    if is_id and _pairs(Counter(both).values()) == _pairs(one.values()):
        return True
    return _determines(both, _BY_CHANCE) or _determines([(b, a) for a, b in both], _BY_CHANCE)


def _determines(both: Sequence[tuple[Hashable, Hashable]], chance: float) -> bool:
    """Whether the first of two values determines the second, and would do so by chance less often than that."""
    own, determined = Counter(a for a, _ in both), Counter(b for _, b in both)
    alike = _pairs(determined.values()) / max(1, _pairs([len(both)]))
    return _pairs(Counter(both).values()) == _pairs(own.values()) and alike ** (len(both) - len(own)) < chance


def counting_fields(answers: Iterable[Answer]) -> set[str]:
    """The fields of numbers that are the length of a list in the same part, wherever there is a list."""
    is_length: dict[str, bool] = {}
    for answer in answers:
        lengths = [set(_lengths(part)) for part in answer.parts]
        for path, value in answer.scalars():
            own, field = lengths[answer.part_of(path)], answer.field(path)
            if own and not isinstance(value, str):
                is_length[field] = value in own and is_length.get(field, True)
    return {field for field, is_always in is_length.items() if is_always}


def _lengths(value: Any) -> Iterator[int]:  # noqa: ANN401 - any JSON value
    if isinstance(value, list):
        yield len(value)
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _lengths(inner)


def decided_keys(field: str, records: Sequence[Record]) -> frozenset[str]:
    """The other fields that a record has or not by the value of a text field, as by the name of a function."""
    by_function: dict[Scalar | None, list[tuple[Scalar, frozenset[str]]]] = {}
    for record in records:
        if isinstance(record.get(field), str):
            keys = frozenset(key for key, value in record.items() if value != NO_VALUE)
            by_function.setdefault(record.get(""), []).append((record[field], keys))
    return frozenset[str]().union(*map(_decided, by_function.values()))


def _decided(kinds: Sequence[tuple[Scalar, frozenset[str]]]) -> frozenset[str]:
    """The keys that a value determines: all that not every record has, or the ones where its rows may lack others."""
    key_sets = {keys: value for value, keys in kinds}
    optional = frozenset.union(*key_sets) - frozenset.intersection(*key_sets)
    own = len(key_sets) == len(set(kinds))
    if own and not any(a < b and key_sets[a] != key_sets[b] for a in key_sets for b in key_sets):
        return optional
    if _determines(kinds, _BY_CHANCE):
        return optional
    chance = _BY_CHANCE / max(1, len(optional))
    return frozenset(key for key in optional if _determines([(value, key in keys) for value, keys in kinds], chance))


def is_tied(field: str, other: str, records: Sequence[Record]) -> bool:
    """Whether rows with the same value of a field have the same one of another more often than any rows, or there are
    no such rows to tell."""
    both = [(record[field], record.get(other)) for record in records if field in record]
    two, same = Counter(b for _, b in both), _pairs(Counter(a for a, _ in both).values())
    if len(two) <= 1:
        return False
    pairs = _pairs([len(both)])
    unlike, unlike_by_chance = same - _pairs(Counter(both).values()), 1 - _pairs(two.values()) / pairs
    return same == 0 or unlike / same < unlike_by_chance / 2


def selects(other: str, field: str, records: Sequence[Record]) -> bool:
    """Whether a field says which others there are, as the name of a function does: most of its values have no such."""
    values = {record[other] for record in records if other in record}
    return 2 * len({record[other] for record in records if other in record and field in record}) < len(values)


def _is_computed(field: str, unsaid: Collection[str], records: Sequence[Record]) -> bool:
    """Whether a number may be a part of a sum or a product: an unsaid field has different numbers beside it.

    Not those in a text that a name determines which prompts say.
    """
    return any(_has_numbers(field, other, records) and _names(other, records) <= {*unsaid} for other in unsaid)


def _has_numbers(field: str, other: str, records: Sequence[Record]) -> bool:
    """Whether a field has different numbers beside those of another one."""
    own = [record for record in records if has_number(record.get(field))]
    return len({value for record in own if has_number(value := record.get(other))}) > 1


def _names(field: str, records: Sequence[Record]) -> set[str]:
    """The fields of names that determine the texts of a field."""
    own = [record for record in records if isinstance(record.get(field), str)]
    names = {key for record in own for key, value in record.items() if not has_number(value)}
    both = {name: [(record[name], record[field]) for record in own if name in record] for name in names}
    return {name for name, pairs in both.items() if _determines(pairs, _BY_CHANCE)}


def has_number(value: Scalar | None) -> bool:
    """Whether a value is a number or a text with digits, such as a time, which may be computed from another one."""
    return isinstance(value, int | float) or (value is not None and re.search(r"\d", value) is not None)


def _pairs(counts: Iterable[int]) -> int:
    return sum(count * (count - 1) // 2 for count in counts)
