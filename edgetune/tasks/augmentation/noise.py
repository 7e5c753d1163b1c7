"""Prompts as a speech recognizer writes them, and as people type in haste; what the answer repeats stays as it is."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from .numbers import LARGE, NUMBER_WORDS, NUMBERS, spoken_number
from .slots import Mention

_SOUNDS_ALIKE = (
    ("to", "too"), ("there", "their"), ("by", "buy"), ("right", "write"), ("hear", "here"), ("know", "no"),
    ("our", "hour"), ("week", "weak"), ("weather", "whether"), ("son", "sun"), ("blue", "blew"), ("whole", "hole"),
    ("mail", "male"), ("road", "rode"), ("sea", "see"), ("your", "you're"),
    ("bedroom", "bed room"), ("bathroom", "bath room"), ("hallway", "hall way"), ("playlist", "play list"),
    ("weekend", "week end"), ("headphones", "head phones"), ("bookshelf", "book shelf"), ("driveway", "drive way"),
)  # fmt: skip
_ALIKE = {word: [other for other in group if other != word] for group in _SOUNDS_ALIKE for word in group}
"""No number is among them, since an answer may have it."""
_FILLERS, _ARTICLES = ("um", "uh", "okay", "so"), ("the", "a", "an")
_NEIGHBOURS = dict(
    pair
    for line in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for place, letter in enumerate(line)
    for pair in [(letter, line[max(0, place - 1) : place] + line[place + 1 : place + 2])]
)
_WORD_RATE = 0.15
"""How often a word is replaced by one that sounds alike, an article is lost, or a filler is added."""
_NUMBER = r"(?<!\w)-?\d++(?:[.:,]\d++)*+(?:\s?%|\w*)"
"""A number with its unit, if there is no space between, or a percent sign."""
_SIGNS = re.compile(
    r"(?!(?<=\d)%|(?<=\d )%)"
    r"[^\w\s.,;:!?\"'()\u2026\u00bf\u00a1\u3001\u3002\uff0c\uff01\uff1f\u00ab\u00bb\u2010-\u201f-]"
    r"|(?<!\w)[:;=]['-]?[()DP/|](?!\w)|\d\s*[-\u2013]\s*\d|(?<!\d)\.\d|\d['\"\u2019\u201d]|\d\s\d{3}(?!\d)"
    r"|(?<!\w)(?:[\u2010-\u2015]|-\s)\s*\d|\n"
)
"""Signs that a speech recognizer would not leave out: of money and of operators, faces, marks on letters, points of
fractions such as .5, feet and inches, spaces between thousands, a minus that is a dash, and ends of lines."""
_UNITS = "|".join(LARGE)
_LARGE = rf"(?:{_UNITS})(?:[ -](?:and[ -])?(?>one|{NUMBER_WORDS}|{_UNITS}))*"
"""The words of a number above 99, which stay as they are, from the first that is too large."""
_TOKEN = re.compile(
    rf"(?<![\w'-])(?i:(?:(?:a|one|{NUMBER_WORDS})[ -])?{_LARGE}|{NUMBER_WORDS})(?![\w'-])"
    rf"|{_NUMBER}|\w+(?:['\u2019-]+\w+)*|[^\w\s]"
)
_DIGITS = 0.5
"""How often a number word is written in digits."""
_TYPED_LETTERS = 4
"""Only words of at least so many letters get a typo, and these have case: others may be whole sentences."""


def noisy(prompt: str, kept: Sequence[Mention], rng: random.Random, *, english: bool) -> tuple[str, str]:
    """The prompt as if spoken or typed in haste, and which of these changes it; `kept` is what stays."""
    stays = bytearray(len(prompt))  # 1 for each character that does
    for mention in kept:
        stays[mention.start : mention.end] = b"\1" * (mention.end - mention.start)
    for kind in rng.sample(("spoken", "spoken", "mistyped", "other case"), 4):
        if kind == "mistyped":
            text = _mistyped(prompt, stays, rng)
        elif kind == "other case":
            text = _changed(prompt, stays, str.upper if rng.random() < _WORD_RATE else str.lower)
        else:
            is_said = not _SIGNS.search(prompt)
            words = _changed(prompt, stays, lambda word: _spoken(word, rng, english=english)).split()
            text = " ".join(words) if is_said else prompt
        if text not in ("", prompt):
            return text, kind
    return prompt, "mistyped"


def has_case(word: str) -> bool:
    """Whether a word has only letters with a small and a capital form, as those of Chinese and Thai have not."""
    return all(letter.islower() or letter.isupper() for letter in word)


def _changed(prompt: str, stays: bytearray, change: Callable[[str], str]) -> str:
    """The prompt with each word, number and punctuation mark changed, except those with characters that stay."""

    def changed(match: re.Match[str]) -> str:
        return match[0] if _is_kept(match, stays) else change(match[0])

    return _TOKEN.sub(changed, prompt)


def _mistyped(prompt: str, stays: bytearray, rng: random.Random) -> str:
    """The prompt with a typo in one word."""
    words = [m for m in _TOKEN.finditer(prompt) if len(m[0]) >= _TYPED_LETTERS and has_case(m[0])]
    words = [match for match in words if match[0].lower() not in NUMBERS and not _is_kept(match, stays)]
    if not words:
        return prompt
    match = rng.choice(words)
    return prompt[: match.start()] + _typo(match[0], rng) + prompt[match.end() :]


def _is_kept(match: re.Match[str], stays: bytearray) -> bool:
    return any(stays[match.start() : match.end()])


def _spoken(word: str, rng: random.Random, *, english: bool) -> str:
    """A word or number as a speech recognizer writes it; a space for punctuation."""
    if not any(map(str.isalnum, word)):
        return " "
    word = word.lower()
    if not english:
        return word
    if (words := spoken_number(word)) is not None:
        return words
    if word[0] == "-" and word[1:].isdecimal() and (words := spoken_number(word[1:])) is not None:
        return f"minus {words}"
    # Recognizers write numbers in either way.
    if (number := NUMBERS.get(word.replace("-", " "))) is not None and rng.random() < _DIGITS:
        return str(number)
    return _misheard(word, rng) if rng.random() < _WORD_RATE else word


def _misheard(word: str, rng: random.Random) -> str:
    """A word that sounds alike, an article twice or not at all, or the word, possibly after a filler."""
    if word in _ARTICLES:
        return rng.choice(("", f"{word} {word}"))
    if word in _ALIKE:
        return rng.choice(_ALIKE[word])
    return f"{rng.choice(_FILLERS)} {word}" if rng.random() < _WORD_RATE else word


def _typo(word: str, rng: random.Random) -> str:
    """A word with two letters swapped, one left out, doubled, or replaced by its neighbour on the keyboard."""
    place = rng.randrange(1, len(word) - 1)
    before, letter, after = word[:place], word[place], word[place + 1 :]
    swapped, near = after[0] + letter + after[1:], rng.choice(_NEIGHBOURS.get(letter.lower(), letter))
    return before + rng.choice((swapped, after, letter * 2 + after, near + after))
