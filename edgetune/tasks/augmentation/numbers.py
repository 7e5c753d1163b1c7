"""Numbers in texts, and how they are said in English."""

from __future__ import annotations

import re

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


def numbers_in(text: str) -> list[int]:
    """The whole numbers that a text may have: those in its digits, and all below 100, which it may have in words."""
    written = [int(digits) for digits in re.findall(r"[0-9]{1,19}", text)]
    return sorted({*range(_LIMIT), *written, *(-number for number in written)})
