"""Finds values of an answer in its prompt, and writes other ones in their places."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from edgetune.tasks.data import TaskRow

from .answers import BETWEEN_TEXTS, Answer, FieldPath, Scalar
from .dependence import has_number
from .numbers import LARGE, NUMBERS, TENS, digit_words, number_word, said_numbers

_SHORT = 3
"""Words of at most so many letters, such as `on`, are values only if no text has them more than once."""
_ANY_SPACE = r"[\s_-]*"


@dataclass(frozen=True)
class Mention:
    """Where a prompt has a value; `is_plural`: with an s that the value does not have."""

    start: int
    end: int
    is_plural: bool = False

    def overlaps(self, other: Mention) -> bool:
        """Whether both have a character in common."""
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Slot:
    """A value of an answer that its prompt has too: its field, its paths in the answer, and its mentions."""

    field: str
    value: Scalar
    paths: tuple[FieldPath, ...]
    mentions: tuple[Mention, ...]


@dataclass(frozen=True)
class SlottedRow:
    """A row with its answers as JSON, and the values in them that a text before has too.

    `english`: the rows are in English, whose number words are values.
    """

    row: TaskRow
    answer: Answer
    slots: Sequence[Slot]
    english: bool

    @classmethod
    def of(cls, row: TaskRow, *, english: bool) -> SlottedRow | None:
        """The row; None if its answer is plain text."""
        answer = Answer.of(row)
        if answer is None:
            return None
        slots = slots_of(answer.said(row), answer, english=english)
        return cls(row, answer, [s for s in slots if answer.is_told(row, s.paths[0], s.mentions[0].start)], english)

    @cached_property
    def said(self) -> str:
        """The prompt, and of a conversation all texts, as `Answer.said` joins them."""
        return self.answer.said(self.row)

    @cached_property
    def other_numbers(self) -> Sequence[Scalar]:
        """The numbers, times and dates in the texts that are in no slot."""
        return said_numbers(_without(self.said, self.slots))

    def is_elsewhere(self, slot: Slot) -> bool:
        """Whether the texts may have the value of a slot in another role or form too.

        In another role if a text has it more often than the answer, as in `book a book`. In another form, which would
        stay as it is, in English only as a part of a word, as in compounds; other languages also have other endings.
        """
        in_text = Counter(self.said.count(BETWEEN_TEXTS, 0, mention.start) for mention in slot.mentions)
        if max(in_text.values()) > len(slot.paths):
            return True
        said, is_word = _without(self.said, [slot]), not has_number(slot.value)
        # Many words of English have `on` or `in` as a part.
        if self.english and is_word and len(str(slot.value)) < _SHORT:
            return False
        return bool(parts_of(said, slot.value)) or (is_word and not self.english and _has_stem(said, str(slot.value)))


def slots_of(prompt: str, answer: Answer, *, english: bool) -> list[Slot]:
    """The values of the answer that occur in the prompt as whole words, in order; not those that overlap others."""
    paths: dict[tuple[str, Scalar], list[FieldPath]] = {}
    for path, value in answer.scalars():
        paths.setdefault((answer.field(path), value), []).append(path)
    slots = [
        Slot(field, value, tuple(places), mentions)
        for (field, value), places in paths.items()
        if (mentions := tuple(mentions_of(prompt, value, english=english)))
    ]
    return [slot for slot in slots if not any(_overlap(slot, other) for other in slots if other is not slot)]


def mentions_of(text: str, value: Scalar, *, english: bool = True) -> list[Mention]:
    """Where a text has the value: texts in any case, with spaces for _, or a plural s; numbers in digits or words.

    Texts of digits may be said digit by digit. Number words, also digit by digit, are looked for only
    if the text is `english`.
    """
    pattern = _pattern(value, text, english=english)
    mentions = [Mention(m.start(), m.end(), bool(m["plural"])) for m in pattern.finditer(text)] if pattern else []
    is_short = isinstance(value, str) and len(value) <= _SHORT and value.isalpha()
    texts = {text.count(BETWEEN_TEXTS, 0, mention.start) for mention in mentions}
    return [] if is_short and len(texts) < len(mentions) else mentions


def has_value(text: str, value: Scalar) -> bool:
    """Whether a text has the value, also a short word more than once."""
    pattern = _pattern(value, text)
    return pattern is not None and pattern.search(text) is not None


def parts_of(text: str, value: Scalar) -> list[Mention]:
    """Where a text has the value, also as a part of a word, as in compounds, or without spaces, as in Chinese."""
    words = spoken(value if isinstance(value, str) else _digits(value)).split()
    is_letter = len(words) == 1 and len(words[0]) == 1 and words[0].lower() != words[0].upper()
    # As in `_pattern`.
    if not words or is_letter or words[0].lower() not in text.lower():
        return []
    pattern = rf"(?!(?<=\d)\d|(?<=\d[.:,])\d){_ANY_SPACE.join(map(re.escape, words))}(?!(?<=\d)[.:,]?\d)"
    return [Mention(m.start(), m.end()) for m in re.finditer(pattern, text, re.IGNORECASE)]


def _has_stem(text: str, value: str) -> bool:
    """Whether a text has words that begin as those of the value do, with half of their letters and one more."""
    stems = [rf"{re.escape(word[: max(_SHORT, len(word) // 2 + 1)])}\w*" for word in spoken(value).split()]
    return bool(stems) and re.search(rf"(?<!\w){_ANY_SPACE.join(stems)}", text, re.IGNORECASE) is not None


def _without(text: str, slots: Sequence[Slot]) -> str:
    """The text with spaces for the mentions of these slots."""
    for mention in (mention for slot in slots for mention in slot.mentions):
        text = f"{text[: mention.start]}{' ' * (mention.end - mention.start)}{text[mention.end :]}"
    return text


def with_values(prompt: str, changes: Sequence[tuple[Slot, Scalar]], written: Sequence[bool]) -> str:
    """The prompt with another value in each slot, as the one before was: in its case, in words, in the plural.

    `written` says of each text whether a program wrote it: there the names of programs stay as they are.
    """
    edits = []
    for slot, new in changes:
        for mention in slot.mentions:
            old = prompt[mention.start : mention.end]
            is_raw = old == slot.value and ("_" in old or written[prompt.count(BETWEEN_TEXTS, 0, mention.start)])
            edits.append((mention, str(new) if is_raw else _written(new, slot.value, old, is_plural=mention.is_plural)))
    for mention, text in sorted(edits, key=lambda edit: -edit[0].start):
        prompt = prompt[: mention.start] + text + prompt[mention.end :]
    return prompt


def spoken(value: str) -> str:
    """A value as people say it: names of programs have _ for spaces."""
    return value.replace("_", " ").strip()


def _pattern(value: Scalar, text: str, *, english: bool = True) -> re.Pattern[str] | None:
    """What finds the value; None where it has no mention, or it is plain that the text has none."""
    # A look is much faster than the pattern of a value that is seen for the first time.
    lower = text.lower()
    if not isinstance(value, str):
        first = re.split("[ -]", number_word(value) or "")[0]
        is_large = value >= _HUNDRED and any(word in lower for word in LARGE)
        in_words = is_large or (0 <= value < _HUNDRED and first in lower)
        return _number_pattern(value, in_words=english and in_words)
    first = next(iter(spoken(value).split()), "")
    in_words = english and _is_digits(value) and _DIGIT_WORDS.search(lower) is not None
    return _text_pattern(value, in_words=in_words) if in_words or first.lower() in lower else None


def _overlap(one: Slot, other: Slot) -> bool:
    return any(a.overlaps(b) for a in one.mentions for b in other.mentions)


@lru_cache(maxsize=1 << 16)
def _text_pattern(value: str, *, in_words: bool) -> re.Pattern[str] | None:
    words = [re.escape(word) for word in spoken(value).split()]
    if not words or (len(words) == 1 and len(spoken(value)) < 2 and not value.isdigit()):
        return None
    plural = "(?P<plural>(?:e?s)?)" if value[-1].isalpha() and not value.lower().endswith("s") else "(?P<plural>)"
    phrase = r"[\s_-]+".join(words)
    if in_words:
        said = "[ ,-]+".join(_ZERO if word == "zero" else word for word in digit_words(value).split())
        phrase = f"(?:{phrase}|{_NOT_AFTER_WORDS}{said}{_NOT_BEFORE_WORDS})"
    return re.compile(rf"{_NOT_INSIDE}{phrase}{plural}{_NOT_BEFORE}", re.IGNORECASE)


@lru_cache(maxsize=1 << 16)
def _number_pattern(value: float, *, in_words: bool) -> re.Pattern[str]:
    forms = [re.escape(_digits(value))]
    word = number_word(value) if in_words else None
    if word is not None and value != 1:  # "one" is more often no number
        said = re.sub("^one (?=hundred|thousand)", "(?:a|one) ", word.replace("-", "[ -]"))
        said = re.sub("(hundred|thousand) ", r"\1 (?:and )?", said)
        forms.append(f"{_NOT_AFTER_WORDS}{said}{_NOT_BEFORE_WORDS}")
    number = rf"(?:{'|'.join(forms)})(?![ -](?:{'|'.join(LARGE)})\b)"
    return re.compile(rf"{_NOT_INSIDE}{number}{_NOT_BEFORE}(?P<plural>)", re.IGNORECASE)


# Not a part of another word, or of a time, a fraction, a negative or a decimal number, also one such as .5.
_NOT_INSIDE, _NOT_BEFORE = r"(?<!\w)(?<!\d[.:,/])(?!(?<=(?<!\w)[-\u2010-\u2015\u2212.])\d)", r"(?!\w)(?![.:,/]\d)"
# Nor of another number in words, such as "two" of "twenty two", of "two hundred", of "one hundred and two" and of
# "four oh two".
_HUNDRED, _ZERO = 100, "(?:zero|oh|o)"
_BEFORE = (*TENS, *LARGE, *(f"{each} and" for each in LARGE), "point", "oh", "double", "triple")
_NOT_AFTER_WORDS = "".join(rf"(?<!\b{word}[ ,-])" for word in (*_BEFORE, *digit_words("0123456789").split()))
_NUMBER_WORDS = rf"(?:zero|oh|one|{'|'.join(NUMBERS)})\b"
_NOT_BEFORE_WORDS = rf"(?![ -](?:point\b|{_NUMBER_WORDS}))(?!(?:(?<=hundred)|(?<=thousand)) and {_NUMBER_WORDS})"
_DIGIT_WORDS = re.compile(rf"\b(?:oh|o|{digit_words('0123456789').replace(' ', '|')})\b")


def _is_digits(value: str) -> bool:
    return len(value) > 1 and value.isascii() and value.isdecimal()


def _digits(number: float) -> str:
    """A number as people write it: whole ones without a decimal point, others with all digits."""
    return str(int(number)) if isinstance(number, int) or number.is_integer() else repr(number)


def _written(new: Scalar, old: Scalar, text: str, *, is_plural: bool) -> str:
    if not isinstance(new, str):
        word = None if text[0].isdigit() or text[0] == "-" else number_word(new)
        if word is not None and " " in text and "-" not in text:
            word = word.replace("-", " ")
        return word or _digits(new)
    if text == old:
        return spoken(new)
    if _is_digits(str(old)) and _is_digits(new):
        return digit_words(new)
    phrase = _plural(spoken(new)) if is_plural else spoken(new)
    if text.islower() and not str(old).islower():
        return phrase.lower()
    if phrase.islower() and text[0].isupper():
        return phrase.upper() if text.isupper() and len(text) > 1 else phrase[0].upper() + phrase[1:]
    return phrase


def _plural(word: str) -> str:
    if word.endswith("s"):
        return word
    return f"{word}{'es' if word.endswith(('x', 'ch', 'sh', 'z')) else 's'}"
