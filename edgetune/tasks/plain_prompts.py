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
_LENGTHS = "'\"\u2032"
"""Signs of feet and inches, as in 5'."""
_EMOJI_STYLE = "\ufe0e\ufe0f"
"""What says whether an emoji is in color."""


# Roles, calls and tools are the same in most rows, and turns in the beginnings of a conversation.
@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """A text without case, with single spaces, and without punctuation at the ends of words.

    Marks and quotes do not count after a space either, as in French. Letters, apostrophes and dashes have one form
    each, and invisible characters are left out. Signs such as $, % and # count, and of numbers the -, the point of .5
    and those of feet and inches.
    """
    folded = text if text.isascii() else text.translate({ord(sign): _folded(sign) for sign in set(text)})
    composed = unicodedata.normalize("NFC", folded).casefold()
    punctuation = "".join(filter(_is_punctuation, set(composed)))
    marks = "".join(filter(_is_mark, punctuation))
    words = _BETWEEN_WORDS.sub(" ", composed).split()
    words = [word for word in words if word.strip(marks)] or words
    lengths = _lengths_in(composed)
    return " ".join(_without_ends(word, punctuation, lengths) for word in words)


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


def _without_ends(word: str, punctuation: str, lengths: str) -> str:
    """The word without punctuation at its ends, except what makes a number another one; punctuation alone as it is."""
    bare = word.strip(punctuation)
    if bare in ("", word):
        return word
    before, _, after = word.partition(bare)
    minus = point = length = ""
    if bare[0].isdecimal():
        point = "." if before.endswith(".") and not before.endswith("..") else ""
        minus = "-" if before.removesuffix(point).endswith("-") else ""
    if bare[-1].isdecimal():
        length = after[: len(after) - len(after.lstrip(lengths))] if lengths else ""
    return f"{minus}{point}{bare}{length}"


def _lengths_in(text: str) -> str:
    """The signs of feet and inches, without those that begin a quotation, and so may end one after a number."""
    return "".join(
        sign for sign in _LENGTHS if sign in text and not re.search(rf"(?<![\w{_LENGTHS}]){sign}(?=\S)", text)
    )


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
