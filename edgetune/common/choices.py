"""Tells whether values that were seen are probably all that there are: none of them occurs only once.

The Good-Turing estimate of the probability of an unseen value is the share of values seen once.
"""

from __future__ import annotations

from collections import Counter

MAX_CHOICES = 50
_MIN_REPEATS = 5
"""Occurrences per distinct value before a list of values counts as complete."""


def is_complete(values: Counter[str]) -> bool:
    """Whether these are probably all values that occur."""
    is_few = 0 < len(values) <= MAX_CHOICES and values.total() >= _MIN_REPEATS * len(values)
    return is_few and "" not in values and min(values.values()) > 1
