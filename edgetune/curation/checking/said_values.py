"""Finds values of answers that the prompt does not have, in fields whose values most prompts have."""

from __future__ import annotations

import difflib
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from edgetune.tasks.augmentation.answers import Answer, Scalar
from edgetune.tasks.augmentation.slots import has_value, parts_of, spoken
from edgetune.tasks.data import TaskRow

from .findings import MISFIT, Finding, SplitRow

_SAID, _ENOUGH = 0.8, 30
"""Share of a field's texts that the prompt has, and their number, from which one that it does not have is odd."""
_FEW_PROMPTS = 2
"""A value that more prompts lack is probably another word for what they say. `unsaid_texts` takes one prompt alone."""
_MOST_WORDS = 12
"""Longer texts are looked for as they are, since other forms of so many words take long."""
_ALIKE = 0.75
"""Least similarity of a word with one of the prompt that is a form of it, or is misspelled."""


def unsaid_texts(rows: Sequence[SplitRow]) -> Iterator[Finding]:
    """The rows with a text that their prompt alone lacks, in a field whose texts most prompts have."""
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
    """The relative likelihoods of the rows' last answers, lower where the prompt and few others lack a value.

    Each is multiplied by the lowest share of rows, of those with the same field and a likelihood from the median on,
    whose prompts lack its value too. One row of either kind is added, so that no share is 0. Of an answer that the
    model would give too (1) the likelihood stays, whatever its values.
    """
    values, median = [_values_of(row) for row in rows], statistics.median(relative)
    unsaid = Counter(key for row in values for key, is_said in row.items() if not is_said)
    having: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    for row, likelihood in zip(values, relative, strict=True):
        if likelihood >= median:
            having.update({field for field, _ in row})
            lacking.update({field for (field, _), is_said in row.items() if not is_said})
    changed = []
    for row, likelihood in zip(values, relative, strict=True):
        odd = {key[0] for key, is_said in row.items() if not is_said and unsaid[key] <= _FEW_PROMPTS}
        share = min(((lacking[field] + 1) / (having[field] + 2) for field in odd), default=1)
        changed.append(likelihood * share if likelihood < 1 else likelihood)
    return changed


def parts_of_answer(row: TaskRow) -> set[str]:
    """The fields of a row's last answer; of a text, such as a label, the text itself."""
    return {field for field, _ in _scalars_of(row)} or {row.completion or ""}


def text_before(row: TaskRow) -> str:
    """All that the model reads before the last answer of a row."""
    return "\n".join(turn["content"] for turn in row.turns[:-1])


def _values_of(row: TaskRow) -> Mapping[tuple[str, Scalar], bool]:
    """The texts and numbers of the last answer, in JSON or calls, by field, and whether the text before has them."""
    text = text_before(row)
    return {(field, value): _is_said(text, value) for field, value in _scalars_of(row)}


def _scalars_of(row: TaskRow) -> list[tuple[str, Scalar]]:
    """The fields and values of the last answer, in JSON or calls."""
    answer, last = Answer.of(row), len(row.turns) - 1
    if answer is None:
        return []
    return [(answer.field(path), value) for path, value in answer.scalars() if answer.place_of(path) == last]


def _is_said(text: str, value: Scalar) -> bool:
    """Whether a text has a value, also as a part of a word, misspelled, or with other endings."""
    own = _words(spoken(str(value)))
    if len(own) > _MOST_WORDS:
        return spoken(str(value)).lower() in text.lower()
    if has_value(text, value) or parts_of(text, value):
        return True
    if not isinstance(value, str):
        return False
    if _NUMBER.fullmatch(value):
        return has_value(text, int(value))
    words = set(_words(text))
    return all(word in words or difflib.get_close_matches(word, words, n=1, cutoff=_ALIKE) for word in own)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


_NUMBER = re.compile("[0-9]{1,9}")
