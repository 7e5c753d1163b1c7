"""Writes prompts so that those that differ in case, white space and punctuation alone are the same."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from .data import TaskRow

_SIGNS = frozenset("#%&*@/\\§‰٪")
"""Punctuation in Unicode that is read as a word or changes one, as in 50% and C#."""
_AS_TYPED = dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'") | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
"""Apostrophes and dashes, as the keyboard has them."""
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])[,;!?]+(?=[^\W\d_])")
"""Punctuation without the space after it."""
_EMOJI_STYLE = "\ufe0e\ufe0f"
"""What says whether an emoji is in color."""


# Roles, calls and tools are the same in most rows.
@lru_cache(maxsize=64)
def plain(text: str) -> str:
    """A text without case, with single spaces, and without punctuation at the ends of words.

    Marks and quotes do not count after a space either, as in French. Letters, apostrophes and dashes have one form
    each, and invisible characters are left out. Signs such as $, % and # count, and the - of a negative number.
    """
    folded = text if text.isascii() else text.translate({ord(sign): _folded(sign) for sign in set(text)})
    composed = unicodedata.normalize("NFC", folded).casefold()
    punctuation = "".join(filter(_is_punctuation, set(composed)))
    marks = "".join(filter(_is_mark, punctuation))
    words = _BETWEEN_WORDS.sub(" ", composed).split()
    words = [word for word in words if word.strip(marks)] or words
    return " ".join(_without_ends(word, punctuation) for word in words)


def plain_prompt(row: TaskRow) -> str:
    """All turns before the answer, and the tools, for comparison with those of other rows."""
    if row.messages is None:
        return plain(row.text or "")
    turns = [(role, content, json.dumps(calls, sort_keys=True)) for role, content, calls in row.compared_turns]
    return " ".join(map(plain, [*chain.from_iterable(turns), row.tools.text if row.tools else ""]))


def answered_prompts(rows: Iterable[TaskRow], prompt_of: Callable[[TaskRow], str] = plain_prompt) -> set[str]:
    """The plain prompts of all answers that are learned of the rows, or scored, also of earlier turns."""
    return {prompt_of(answer) for row in rows for answer in row.answers}


def without_system(row: TaskRow) -> TaskRow:
    """The row without the system prompt of its own."""
    return row if row.system is None else replace(row, messages=(row.messages or ())[1:])


def shared_prompt(apart: Iterable[TaskRow], trained: Iterable[TaskRow]) -> Callable[[TaskRow], str]:
    """What gives the plain prompt of a row, for comparison across rows kept `apart` and `trained` ones.

    System prompts, which may differ in the date alone, count only in prompts that both have without them: such rows
    were split by their system prompts, which may be what the prompt is about.
    """
    split = answered_prompts(map(without_system, apart)) & answered_prompts(map(without_system, trained))

    def prompt_of(row: TaskRow) -> str:
        prompt = plain_prompt(without_system(row))
        return plain_prompt(row) if prompt in split else prompt

    return prompt_of


def _without_ends(word: str, punctuation: str) -> str:
    """The word without punctuation at its ends; a word of punctuation alone as it is."""
    bare = word.strip(punctuation) or word
    return f"-{bare}" if bare[0].isdecimal() and f"-{bare}" in word else bare


def _folded(sign: str) -> str:
    """The form that a character has in common with those that are read in the same way."""
    if sign in _EMOJI_STYLE or unicodedata.category(sign) == "Cf":
        return ""
    # Powers are other numbers: 10² is not 102.
    is_power = unicodedata.decomposition(sign).startswith("<super>")
    return _AS_TYPED.get(sign) or (sign if is_power else unicodedata.normalize("NFKC", sign))


def _is_punctuation(sign: str) -> bool:
    return unicodedata.category(sign).startswith("P") and sign not in _SIGNS


def _is_mark(punctuation: str) -> bool:
    """Whether punctuation ends a sentence or a part of it, or is a quote, in any script."""
    return unicodedata.category(punctuation) in ("Po", "Pi", "Pf")
