"""Writes prompts so that those that differ in case, white space and punctuation alone are the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable

from .data import TaskRow

_ENDS = ".,;:!?\"'()…"


def plain(text: str) -> str:
    """A text without case, with single spaces, composed letters, and without punctuation at the ends of words."""
    composed = unicodedata.normalize("NFC", text)
    return " ".join(word.strip(_ENDS) or word for word in composed.casefold().split())


def plain_prompt(row: TaskRow) -> str:
    """All turns before the answer, and the tools, for comparison with those of other rows."""
    if row.messages is None:
        return plain(row.text or "")
    turns = [f"{role} {content} {json.dumps(calls, sort_keys=True)}" for role, content, calls in row.compared_turns]
    return plain("\n".join([*turns, row.tools.text if row.tools else ""]))


def answered_prompts(rows: Iterable[TaskRow]) -> set[str]:
    """The plain prompts of all answers that are learned of the rows, or scored, also of earlier turns."""
    return {plain_prompt(answer) for row in rows for answer in row.answers}
