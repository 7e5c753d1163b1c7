"""Rounds of measurements that take turns, and their medians and ranges."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .tables import progress

T = TypeVar("T")


def in_turns(runs: Mapping[str, Callable[[], T]], rounds: int, *, warmups: int = 0) -> dict[str, list[T]]:
    """What each of `runs` returned in each round.

    Each round runs all of them, so that slow phases of the machine affect all. `warmups` rounds come first and do not
    count.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(-warmups, rounds):
        for name, run in runs.items():
            progress(f"round {number + 1} of {rounds}: {name}")
            result = run()
            if number >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median and range."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; with fewer than 100 values the largest."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]
