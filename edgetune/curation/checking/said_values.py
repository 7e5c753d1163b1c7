"""Finds values of answers that the prompt does not have, in fields whose values most prompts have."""

from __future__ import annotations

import difflib
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from edgetune.tasks.augmentation.answers import Answer, Scalar
from edgetune.tasks.augmentation.slots import has_value, parts_of, spoken
from edgetune.tasks.data import TaskRow

from .findings import MISFIT, Finding, SplitRow

_SAID, _ENOUGH = 0.8, 30
"""Share of a field's texts that the prompt has, and their number, from which one that it does not have is odd."""
_ALIKE = 0.75
"""Least similarity of a word with one of the prompt that is a form of it, or is misspelled."""


def unsaid_texts(rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """The rows with a text that their prompt does not have, in a field whose texts most prompts have.

    A text that several prompts lack is probably another word for what they say.
    """
    values = [_values_of(item.row) for item in rows]
    fields: Counter[str] = Counter()
    said: Counter[str] = Counter()
    unsaid: Counter[tuple[str, Scalar]] = Counter()
    for row in values:
        for (field, value), is_said in row.items():
            if isinstance(value, str):
                fields[field] += 1
                said[field] += is_said
                unsaid[field, value] += not is_said
    usual = {field for field, count in fields.items() if count >= _ENOUGH and said[field] >= _SAID * count}
    for item, row in zip(rows, values, strict=True):
        for field, value in row:
            if field in usual and unsaid[field, value] == 1 and not row[field, value]:
                note = (
                    f"{field} is {value!r}, which is not in the prompt; in {said[field]} of {fields[field]} rows it is"
                )
                yield Finding.of(MISFIT, [item], note)
                break


def with_unsaid_values(rows: Sequence[TaskRow], relative: Sequence[float]) -> list[float]:
    """The relative likelihoods of answers, lower for those with values that the prompt does not have.

    Each is multiplied by the lowest share of rows, of those with the same field and a likelihood from the median on,
    whose prompts do not have its value either. One row of either kind is added, so that no share is 0. Of an answer
    that the model would give too (1) the likelihood stays, whatever its values.
    """
    said, median = [_said_fields(row) for row in rows], statistics.median(relative)
    having: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    for fields, likelihood in zip(said, relative, strict=True):
        if likelihood >= median:
            having.update(fields.keys())
            lacking.update(field for field, is_said in fields.items() if not is_said)
    shares = {field: (lacking[field] + 1) / (having[field] + 2) for field in chain.from_iterable(said)}
    return [
        likelihood * min((shares[field] for field, is_said in fields.items() if not is_said), default=1)
        if likelihood < 1
        else likelihood
        for fields, likelihood in zip(said, relative, strict=True)
    ]


def _said_fields(row: TaskRow) -> dict[str, bool]:
    """Whether the prompts of a row's answers have all values of a field."""
    fields: dict[str, bool] = {}
    for (field, _), is_said in chain.from_iterable(_values_of(part).items() for part in row.answers):
        fields[field] = fields.get(field, True) and is_said
    return fields


def _values_of(row: TaskRow) -> Mapping[tuple[str, Scalar], bool]:
    """The texts and numbers of the last answer, in JSON or calls, by field, and whether a text before has them."""
    answer = Answer.of(row)
    if answer is None:
        return {}
    text = answer.said(row)
    last = len(row.turns) - 1
    values = [(answer.field(path), value) for path, value in answer.scalars() if answer.place_of(path) == last]
    return {(field, value): _is_said(text, value) for field, value in values}


def _is_said(text: str, value: Scalar) -> bool:
    """Whether a text has a value, also as a part of a word, misspelled, or with other endings."""
    if has_value(text, value) or parts_of(text, value):
        return True
    words = re.findall(r"\w+", text.lower())
    own = re.findall(r"\w+", spoken(str(value)).lower())
    return isinstance(value, str) and all(difflib.get_close_matches(word, words, n=1, cutoff=_ALIKE) for word in own)
