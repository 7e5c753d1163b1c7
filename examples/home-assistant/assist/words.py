"""Compares the words of a sentence with those of names, in spite of typos, plurals and numbers as words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
"""The numbers below 20 in words."""
_SKIPPED = frozenset(
    {"the", "a", "an", "my", "our", "your", "of", "in", "at", "to", "on", "off", "for", "and", "please", "s"}
)


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """The words of a text in a comparable form: small letters, no accents, singular, `two` as `2`."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"['\u2019]", " ", plain)
    return tuple(_comparable(word) for word in re.findall(r"[^\W_]+", plain))


def content(words: Sequence[str]) -> tuple[str, ...]:
    """The words without articles and prepositions, or all if nothing else is left."""
    return tuple(word for word in words if word not in _SKIPPED) or tuple(words)


def spoken(sentence: str) -> frozenset[str]:
    """The words of a sentence, and each two neighbors as one word: `bed room` is `bedroom`."""
    words = tokens(sentence)
    return frozenset(words) | {one + two for one, two in pairwise(words)}


@lru_cache(maxsize=65536)
def alike(one: str, two: str) -> bool:
    """Whether two words are equal but for one typo, or two in a long word.

    Short words, numbers and first letters must be equal: `lock` is not `dock`.
    """
    if one == two:
        return True
    shorter = min(len(one), len(two))
    if shorter < 5 or one[0] != two[0] or not (one + two).isalpha():
        return False
    return _distance(one, two) <= (2 if shorter > 7 else 1)


def said(word: str, sentence: Collection[str]) -> bool:
    """Whether a sentence has this word, as `spoken` returns it."""
    return word in sentence or any(alike(word, other) for other in sentence)


def share_said(name: str, sentence: Collection[str], ignored: Collection[str] = ()) -> float:
    """The share, 0 to 1, of a name's words that a sentence has; `ignored` ones do not count if there are others."""
    words = content(tokens(name))
    words = tuple(word for word in words if word not in ignored) or words
    if not words:
        return 0.0
    if "".join(words) in sentence:
        return 1.0
    return sum(said(word, sentence) for word in words) / len(words)


def _comparable(word: str) -> str:
    if word in NUMBERS:
        return str(NUMBERS.index(word))
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def _distance(one: str, two: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbors that make one word the other."""
    before: list[int] = []
    row = list(range(len(two) + 1))
    for i, letter in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(two, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == two[j - 2] and one[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]
