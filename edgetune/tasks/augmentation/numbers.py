"""Number words of English, from zero to ninety-nine."""

from __future__ import annotations

_BELOW_20 = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LIMIT = 100


def number_word(number: float) -> str | None:
    """The number in words; None for others than whole ones below 100."""
    if number != int(number) or not 0 <= number < _LIMIT:
        return None
    if number < len(_BELOW_20):
        return _BELOW_20[int(number)]
    tens, ones = divmod(int(number), 10)
    return _TENS[tens - 2] + (f"-{_BELOW_20[ones]}" if ones else "")
