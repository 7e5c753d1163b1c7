"""Numbers in texts, and the number words of English, from zero to ninety-nine."""

from __future__ import annotations

import re

_BELOW_20 = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LIMIT = 100


def number_word(number: float) -> str | None:
    """The number in words; None for others than whole ones below 100."""
    if not 0 <= number < _LIMIT or number != int(number):
        return None
    if number < len(_BELOW_20):
        return _BELOW_20[int(number)]
    tens, ones = divmod(int(number), 10)
    return TENS[tens - 2] + (f"-{_BELOW_20[ones]}" if ones else "")


NUMBERS = {(number_word(number) or "").replace("-", " "): number for number in range(2, _LIMIT)}
"""The numbers by their words, such as `twenty five`; "one" is more often no number."""


def numbers_in(text: str) -> list[int]:
    """The whole numbers that a text may have: those in its digits, and all that have a word."""
    written = [int(digits) for digits in re.findall(r"[0-9]{1,19}", text)]
    return sorted({*range(_LIMIT), *written, *(-number for number in written)})
