"""Chooses a few rows that stand for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from edgetune_runtime.errors import UsageError

T = TypeVar("T")


def check_limit(limit: int) -> None:
    """UsageError for a limit below 1."""
    if limit < 1:
        raise UsageError(f"a limit of {limit} rows leaves nothing to score", "use at least 1")


def spread(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` rows, one of each part of as many; UsageError for a limit below 1.

    Which one is random, the same each time: rows may be sorted, or alternate between kinds.
    """
    if limit is None or limit >= len(rows):
        return rows
    check_limit(limit)
    ends = [index * len(rows) // limit for index in range(limit + 1)]
    rng = random.Random(limit)
    return [rows[rng.randrange(start, end)] for start, end in pairwise(ends)]
