"""Writes prompts so that those that differ in case, white space and punctuation alone are the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable

from .data import TaskRow

_SIGNS = frozenset("#%&*@/\\§‰٪")
"""Punctuation in Unicode that is read as a word or changes one, as in 50% and C#."""


def plain(text: str) -> str:
    """A text without case, with single spaces, composed letters, and without punctuation at the ends of words.

    Signs such as $, % and # count, and the - of a negative number.
    """
    composed = unicodedata.normalize("NFC", text).casefold()
    punctuation = "".join(filter(_is_punctuation, set(composed)))
    return " ".join(_without_ends(word, punctuation) for word in composed.split())


def plain_prompt(row: TaskRow) -> str:
    """All turns before the answer, and the tools, for comparison with those of other rows."""
    if row.messages is None:
        return plain(row.text or "")
    turns = [f"{role} {content} {json.dumps(calls, sort_keys=True)}" for role, content, calls in row.compared_turns]
    return plain("\n".join([*turns, row.tools.text if row.tools else ""]))


def answered_prompts(rows: Iterable[TaskRow]) -> set[str]:
    """The plain prompts of all answers that are learned of the rows, or scored, also of earlier turns."""
    return {plain_prompt(answer) for row in rows for answer in row.answers}


def _without_ends(word: str, punctuation: str) -> str:
    """The word without punctuation at its ends; a word of punctuation alone as it is."""
    bare = word.strip(punctuation) or word
    return f"-{bare}" if bare[0].isdecimal() and f"-{bare}" in word else bare


def _is_punctuation(sign: str) -> bool:
    return unicodedata.category(sign).startswith("P") and sign not in _SIGNS
