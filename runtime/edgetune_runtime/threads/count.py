"""How many threads to compute with, by what they got of the cores and what a token took.

What counts is the share of the cores that the process' threads got: CPU time over wall time. Where it is low, fewer
threads are tried; where a core seems to be free, one more; the measured time of a token decides which number stays.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from .machine import cores_left, others_running

_WINDOW_S = 0.05
"""What is measured before anything is decided."""
_FULL_SHARE = 0.85
"""Threads that got less than this of their cores were kept waiting by others."""
_BLIND_HOLDS = 2
"""Longest holds until one more thread is tried even though no core seems to be free."""
_FAILED_FACTOR = 2.0
"""A single step on probation that takes this many times what a token took before ends the probation."""


@dataclass
class Usage:
    """What a number of steps took: seconds of wall and CPU time, core-seconds that were wanted, steps and tokens."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    wanted_s: float = 0.0
    steps: int = 0
    tokens: float = 0.0

    def add(self, tokens: float, wall_s: float, cpu_s: float, threads: int) -> None:
        """Count one more step, which wanted so many threads."""
        self.wall_s += wall_s
        self.cpu_s += cpu_s
        self.wanted_s += wall_s * threads
        self.steps += 1
        self.tokens += tokens

    @property
    def share(self) -> float:
        """Share of the wanted cores that was had, 1 where nothing was measured."""
        return self.cpu_s / self.wanted_s if self.wanted_s else 1.0

    @property
    def token_s(self) -> float:
        """Seconds per token."""
        return self.wall_s / max(1.0, self.tokens)


@dataclass
class _Trial:
    """Another number of threads on probation: the one before, its seconds per token, and the gain that is asked."""

    before: int
    token_s: float
    gain: float


class ThreadCount:
    """The number of `threads` to compute with, at most `most` and the cores that are left (`limit`).

    A window of measurements has at least `window_steps` steps, unless cores are lacking. A number of threads that did
    not help is tried again after a time between `first_hold_s` and `longest_hold_s`, doubled each time. One that does
    not adjust the threads only measures.
    """

    def __init__(
        self,
        most: int,
        *,
        adjusts: bool = True,
        window_steps: int = 4,
        first_hold_s: float = 0.1,
        longest_hold_s: float = 4.0,
    ) -> None:
        self.most = self.threads = self.limit = most
        self._adjusts = adjusts
        self._window_steps = window_steps
        self._first_hold_s, self._longest_hold_s = first_hold_s, longest_hold_s
        self._window = Usage()
        self._is_even = False
        self._trial: _Trial | None = None
        self._best_s = {True: 0.0, False: 0.0}
        self._recent_s = {True: 0.0, False: 0.0}
        self._hold_s = self._down_hold_s = first_hold_s
        self._up_at = self._down_at = self._blind_at = 0.0
        self._forget_holds()

    def look_around(self) -> None:
        """Begin with as many threads as cores are free, which is only a first guess."""
        left, others = cores_left(), _others()
        self.limit = min(self.most, left)
        self.threads = self.limit if others is None else max(1, min(self.limit, left - others))
        self._window, self._trial = Usage(), None
        self._forget_holds()

    def best_s(self, *, even: bool) -> float:
        """Seconds per token of the fastest window of steps of that kind, 0 before the first; see `record`."""
        return self._best_s[even]

    def recent_s(self, *, even: bool) -> float:
        """Seconds per token of the last window of steps of that kind, 0 before the first."""
        return self._recent_s[even]

    def lacks_cores(self, wall_s: float, cpu_s: float) -> bool:
        """Whether the threads got too little of their cores in that time."""
        return cpu_s < _FULL_SHARE * self.threads * wall_s

    def give_way(self) -> None:
        """Halve the threads after a step that stalled."""
        self.threads = max(1, self.threads // 2)
        self._window, self._trial = Usage(), None
        self._wait_longer()

    def record(self, tokens: float, wall_s: float, cpu_s: float, *, even: bool) -> None:
        """Take a step into account; of `even` steps the tokens cost alike, so that numbers of threads are compared."""
        if even != self._is_even:
            self._window, self._trial, self._is_even = Usage(), None, even
        window, trial = self._window, self._trial
        window.add(tokens, wall_s, cpu_s, self.threads)
        is_more = trial is not None and self.threads > trial.before
        if trial is not None and is_more and wall_s > _FAILED_FACTOR * trial.token_s * tokens:
            self._conclude(trial, window)
            return
        is_short = even and window.steps < self._window_steps and window.share >= _FULL_SHARE
        if window.wall_s < _WINDOW_S or is_short:
            return
        self._window = Usage()
        self._recent_s[even] = window.token_s
        self._best_s[even] = min(self._best_s[even] or window.token_s, window.token_s)
        if self._adjusts:
            self._decide(window)

    def _decide(self, window: Usage) -> None:
        """Keep or take back what is on probation; else try fewer threads, or one more."""
        now = time.monotonic()
        if self._trial is not None:
            self._conclude(self._trial, window)
        elif self.threads > 1 and window.share < _FULL_SHARE:
            if now >= self._down_at:
                had = int(window.share * self.threads + 0.2)
                self._try(max(1, min(had, self.threads - 1)), window, gain=1.0)
                self._up_at = now + self._hold_s
        elif self.threads < self.limit and (now >= self._blind_at or (now >= self._up_at and self._is_core_free())):
            self._blind_at = now + _BLIND_HOLDS * self._longest_hold_s
            self._try(self.threads + 1, window, gain=0.97)
            if not self._is_even:
                self._wait_longer()

    def _try(self, threads: int, window: Usage, gain: float) -> None:
        """Go on with another number of threads, on probation where like is compared with like."""
        self._trial = _Trial(self.threads, window.token_s, gain) if self._is_even else None
        self.threads = threads

    def _conclude(self, trial: _Trial, window: Usage) -> None:
        """Keep the number of threads if a token takes less time by it, else go back and wait longer than before."""
        is_more, self._trial, self._window = self.threads > trial.before, None, Usage()
        if window.token_s <= trial.gain * trial.token_s:
            self._hold_s = self._first_hold_s if is_more else self._hold_s
            return
        self.threads = trial.before
        if is_more:
            self._wait_longer()
        else:
            self._down_at = time.monotonic() + self._down_hold_s
            self._down_hold_s = min(2 * self._down_hold_s, self._longest_hold_s)

    def _is_core_free(self) -> bool:
        others = others_running()
        # Threads of the last step may still wait for the next one.
        return others is None or cores_left() - max(0, others - (self.threads - 1)) > self.threads

    def _wait_longer(self) -> None:
        self._up_at = time.monotonic() + self._hold_s
        self._hold_s = min(2 * self._hold_s, self._longest_hold_s)

    def _forget_holds(self) -> None:
        """Let everything be tried from now on, but what would be tried blindly."""
        self._hold_s = self._down_hold_s = self._first_hold_s
        self._up_at = self._down_at = 0.0
        self._blind_at = time.monotonic() + _BLIND_HOLDS * self._longest_hold_s


def _others() -> int | None:
    """Threads that computed at each of up to three looks, 1 ms apart: those of long work, and no passing ones."""
    least = others_running()
    for _ in range(2):
        if not least:
            break
        time.sleep(0.001)
        least = min(least, others_running() or 0)
    return least
