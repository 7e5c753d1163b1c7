"""Find how many threads compute single tokens the fastest.

A token is little work between hundreds of barriers, and it reads all weights. Where one thread already reads as fast as
the memory allows, or where two cores of the system are one of the processor, more threads only wait for each other.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from .count import FULL_SHARE

_BLOCK, _BLOCKS = 4, 3
"""A trial has so many blocks with each of two numbers of threads, in turn, and so many steps in each. The first step of
a block is not measured, because threads are started in it."""
_GAIN = 0.97
"""Another number of threads is kept if its steps take at most this part of the time."""


@dataclass
class _Trial:
    """The steps of a trial: `threads` is what they could have."""

    threads: int
    usual: int
    other: int
    steps: int = 0
    times_s: dict[int, list[float]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    @property
    def current(self) -> int:
        """The threads of the next step."""
        return self.other if self.steps // _BLOCK % 2 else self.usual

    def add(self, wall_s: float, share: float) -> bool:
        """Add a step with the current threads; whether it was the last one."""
        if self.steps % _BLOCK:
            self.times_s.setdefault(self.current, []).append(wall_s)
            self.shares.append(share)
        self.steps += 1
        return self.steps == 2 * _BLOCK * _BLOCKS

    @property
    def is_other_faster(self) -> bool:
        """Whether the other number was faster, and no other process took the cores meanwhile."""
        usual_s, other_s = (statistics.median(self.times_s[threads]) for threads in (self.usual, self.other))
        return other_s <= _GAIN * usual_s and statistics.mean(self.shares) >= FULL_SHARE


class EnoughThreads:
    """The number of threads for steps of one token, found by trials of one thread fewer or more.

    A trial that changed nothing is followed by the next after `first_hold_s`, doubled each time up to `longest_hold_s`.
    """

    def __init__(self, *, first_hold_s: float = 2.0, longest_hold_s: float = 120.0) -> None:
        self._first_hold_s, self._longest_hold_s = first_hold_s, longest_hold_s
        self._hold_s, self._next_at = first_hold_s, 0.0
        self._enough: int | None = None
        self._trial: _Trial | None = None
        self._is_fewer_next = True

    def of(self, threads: int) -> int:
        """The threads of the next step, which may have so many."""
        usual = min(threads, self._enough or threads)
        if self._trial is not None and self._trial.threads != threads:
            self._trial = None
        if self._trial is None:
            if threads == 1 or time.monotonic() < self._next_at:
                return usual
            self._trial = _Trial(threads, usual, self._other(usual, threads))
        return self._trial.current

    def record(self, threads: int, wall_s: float, share: float) -> None:
        """Record a step with the threads that `of` gave: its time, and the share of its cores that it got."""
        trial = self._trial
        if trial is None or trial.current != threads or not trial.add(wall_s, share):
            return
        self._trial = None
        if trial.is_other_faster:
            self._enough = None if trial.other == trial.threads else trial.other
            self._hold_s = self._first_hold_s
        else:
            self._is_fewer_next = not self._is_fewer_next
            self._hold_s = min(2 * self._hold_s, self._longest_hold_s)
        self._next_at = time.monotonic() + self._hold_s

    def _other(self, usual: int, threads: int) -> int:
        """The number to try: one fewer or one more, in turn where there are both."""
        others = [number for number in (usual - 1, usual + 1) if 1 <= number <= threads]
        return others[0] if self._is_fewer_next else others[-1]
