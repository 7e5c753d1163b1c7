"""Numbers in texts, and how they are said in English."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, pairwise

_BELOW_20 = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LARGE = ("hundred", "thousand", "million")
_LIMIT, _LARGEST = 100, 999_999
YEAR = re.compile(r"1[5-9]\d\d|20\d\d")
# Zeros before a number are those of an id; a full hour may be said in other ways.
_PLAIN, _TIME = re.compile(r"(0|[1-9]\d{0,2})(?:\.(\d+))?(\s?%)?"), re.compile(r"(1?\d|2[0-3]):(0[1-9]|[1-5]\d)")


def number_word(number: float) -> str | None:
    """The number in words; None for others than whole ones from 0 to 999,999."""
    if not 0 <= number <= _LARGEST or number != int(number):
        return None
    if number < len(_BELOW_20):
        return _BELOW_20[int(number)]
    if number < _LIMIT:
        tens, ones = divmod(int(number), 10)
        return TENS[tens - 2] + (f"-{_BELOW_20[ones]}" if ones else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    most, rest = divmod(int(number), unit)
    return f"{number_word(most)} {name}{f' {number_word(rest)}' if rest else ''}"


def digit_words(digits: str) -> str:
    """A text of digits as it is said digit by digit, such as `four zero two`."""
    return " ".join(_BELOW_20[int(digit)] for digit in digits)


NUMBERS = {(number_word(number) or "").replace("-", " "): number for number in range(2, _LIMIT)}
"""The numbers by their words, such as `twenty five`; "one" is more often no number."""

NUMBER_WORDS = "|".join(words.replace(" ", "[ -]") for words in sorted(NUMBERS, key=len, reverse=True))
_WRITTEN = re.compile(r"(?<!\d)(?:\d{4}-\d\d-\d\d|(?:(?<!\w)-)?\d+(?:[.:,/]\d+)*)")
_IN_WORDS = re.compile(rf"(?<![\w-])(?:{NUMBER_WORDS})(?![ -](?:{'|'.join(LARGE)})|[\w-])", re.IGNORECASE)
_PART, _THOUSANDS = re.compile(r"(?:(?<!\w)-)?\d+(?:\.\d+)?"), re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def spoken_number(text: str) -> str | None:
    """A number below 1000, one with a point, a percentage or a time as people say it; None for others, such as 007."""
    if time := _TIME.fullmatch(text):
        return f"{_said(time[1])} {'oh ' * (time[2] < '10')}{_said(time[2])}"
    plain = _PLAIN.fullmatch(text)
    if plain is None:
        return None
    tenths = f" point {digit_words(plain[2])}" if plain[2] else ""
    return f"{_said(plain[1])}{tenths}{' percent' if plain[3] else ''}"


def _said(digits: str) -> str:
    return (number_word(int(digits)) or "").replace("-", " ")


def order(one: float | str, other: float | str) -> int:
    """1 if the first number, time or date is larger, -1 if it is smaller, 0 if neither or they are of other kinds."""
    return _compared(_parts(one), _parts(other))


def has_same_order(text: str, changed: str) -> bool:
    """Whether the numbers, times and dates of a text have the same order in one that has others in their places."""
    found = ([_parts(number) for number in _WRITTEN.findall(each)] for each in (text, changed))
    numbers = sorted(zip(*found, strict=True), key=lambda pair: (len(pair[0]), pair[0]))
    return all(
        _compared(before, next_before) == _compared(after, next_after)
        for (before, after), (next_before, next_after) in pairwise(numbers)
        if len(before) == len(next_before)
    )


def has_result(text: str) -> bool:
    """Whether one of the numbers in a text is the sum, the difference or the product of two others."""
    found = [parts for number in _WRITTEN.findall(text) if len(parts := _parts(number)) == 1]
    numbers = [_rounded(number) for (number,) in found]
    counts = Counter(numbers)
    return any(
        counts[result] > (one, other).count(result)
        for one, other in combinations(numbers, 2)
        for result in (_rounded(one + other), _rounded(one * other))
    )


def _rounded(number: float) -> float:
    """A number without the error of its fraction."""
    return round(number, 6)


def _compared(one: list[float], other: list[float]) -> int:
    return (one > other) - (one < other) if len(one) == len(other) else 0


def _parts(value: float | str) -> list[float]:
    """The numbers that a text has, such as hour and minute, or the number."""
    if not isinstance(value, str):
        return [value]
    return [float(part) for part in _PART.findall(_THOUSANDS.sub("", value).replace(",", "."))]


def said_numbers(text: str) -> list[int | str]:
    """The numbers, times and dates in a text: those in words as numbers, from 2 to 99."""
    in_words = (NUMBERS[words.lower().replace("-", " ")] for words in _IN_WORDS.findall(text))
    return [*_WRITTEN.findall(text), *in_words]


def numbers_in(text: str) -> list[int]:
    """The whole numbers that a text may have: those in its digits, and all below 100, which it may have in words."""
    written = [int(digits) for digits in re.findall(r"[0-9]{1,19}", text)]
    return sorted({*range(_LIMIT), *written, *(-number for number in written)})
