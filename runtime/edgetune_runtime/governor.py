"""Governor of the compute threads: fewer while other processes take the cores, and no step that stalls.

Threads of a step wait for each other hundreds of times; when one of them is off its core, all the others wait for it.
What counts is the share of the cores that the process' threads got: CPU time over wall time. Where it is low, fewer
threads are tried; where it is not, one more from time to time; the measured time of a token decides which number stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from .engines._base import Engine, StepStopped
from .machine import cores_left, others_running
from .watch import WATCH

T = TypeVar("T")

_WINDOW_S, _WINDOW_STEPS = 0.05, 4
"""What is measured before anything is decided."""
_FULL_SHARE = 0.85
"""Threads that got less than this of their cores were kept waiting by others."""
_FIRST_HOLD_S, _LONGEST_HOLD_S = 0.1, 4.0
"""Time until a number of threads that did not help is tried again; doubled each time."""
_BLIND_S = 8.0
"""Time until one more thread is tried even though no core seems to be free."""
_FAILED_FACTOR = 2.0
"""A single step on probation that takes this many times what a token took before ends the probation."""
_STALL_FACTOR, _SHORTEST_STALL_S, _UNKNOWN_STALL_S = 3.0, 0.1, 0.5
"""A step without its share of the cores is begun anew with fewer threads after this many times its usual time."""
_IDLE_S = 0.5
"""After such a pause what was found out about other processes is taken as outdated."""
_SLOW_SHARE, _SLOW_FACTOR = 0.75, 2.0
"""An answer is slow below this share of the cores, or when tokens took this many times the shortest time seen."""


@dataclass
class Usage:
    """What a number of steps took: seconds of wall and CPU time, core-seconds that were wanted, steps and tokens."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    wanted_s: float = 0.0
    steps: int = 0
    tokens: int = 0

    def add(self, tokens: int, wall_s: float, cpu_s: float, threads: int) -> None:
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
        return self.wall_s / max(1, self.tokens)


@dataclass
class _Trial:
    """Another number of threads on probation: the one before, its seconds per token, and the gain that is asked."""

    before: int
    token_s: float
    gain: float


@dataclass
class AnswerUsage:
    """What the steps of one answer took, single tokens apart, as a prompt's tokens take less each."""

    all: Usage = field(default_factory=Usage)
    single: Usage = field(default_factory=Usage)


class Governor:
    """Runs the steps of the engines on one base, one at a time; `most` is the number of threads when all is quiet."""

    def __init__(self, most: int, *, adjusts: bool) -> None:
        self.most = self.threads = most
        self._limit = most
        self._adjusts = adjusts
        self._window = Usage()
        self._is_single = False
        self._trial: _Trial | None = None
        self._hold_s = self._down_hold_s = _FIRST_HOLD_S
        self._up_at = self._down_at = self._blind_at = 0.0
        self._best_s = {True: 0.0, False: 0.0}
        self._stalled = False
        self._ended = -_IDLE_S

    def is_slow(self, usage: AnswerUsage) -> bool:
        """Whether an answer's steps lacked cores, or were much slower than the fastest ones seen."""
        single = usage.single
        is_late = single.steps >= _WINDOW_STEPS and single.token_s > _SLOW_FACTOR * self._best_s[True] > 0
        return usage.all.share < _SLOW_SHARE or is_late

    def step(
        self, engine: Engine, tokens: int, compute: Callable[[], T], check: Callable[[], None], usage: AnswerUsage
    ) -> T:
        """Compute one step, again if it stalls, and count it; `check` may end it by raising, the sequence as before."""
        if time.monotonic() - self._ended > _IDLE_S:
            self._look_around()
        while True:
            if self._adjusts:
                engine.use_threads(self.threads)
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()

            def is_over(begin_s: float = begin_s, begin_cpu_s: float = begin_cpu_s) -> bool:
                return _raises(check) or self._is_stalling(tokens, begin_s, begin_cpu_s)

            try:
                with WATCH.over(is_over, engine.stop_step):
                    result = compute()
            except StepStopped:
                check()
                if self._stalled:
                    self._give_way()
                continue
            finally:
                self._stalled = False
                self._ended = time.monotonic()
            wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
            self._record(tokens, wall_s, cpu_s, usage)
            return result

    def _look_around(self) -> None:
        """After a pause: as many threads as cores are free, which is only a first guess."""
        if not self._adjusts:
            return
        left, others = cores_left(), _others()
        self._limit = min(self.most, left)
        self.threads = self._limit if others is None else max(1, min(self._limit, left - others))
        self._window, self._trial = Usage(), None
        self._hold_s = self._down_hold_s = _FIRST_HOLD_S
        self._up_at = self._down_at = 0.0
        self._blind_at = time.monotonic() + _BLIND_S

    def _is_stalling(self, tokens: int, begin_s: float, begin_cpu_s: float) -> bool:
        """Whether the running step is far over its usual time, because its threads lack cores."""
        if not self._adjusts or self.threads == 1:
            return False
        wall_s = time.perf_counter() - begin_s
        usual_s = self._best_s[tokens == 1] * tokens
        patience_s = max(_SHORTEST_STALL_S, _STALL_FACTOR * usual_s) if usual_s else _UNKNOWN_STALL_S
        if wall_s < patience_s:
            return False
        self._stalled = time.process_time() - begin_cpu_s < _FULL_SHARE * self.threads * wall_s
        return self._stalled

    def _give_way(self) -> None:
        """After a stalled step: half of the threads, for longer each time."""
        self.threads = max(1, self.threads // 2)
        self._window, self._trial = Usage(), None
        self._wait_longer()

    def _record(self, tokens: int, wall_s: float, cpu_s: float, usage: AnswerUsage) -> None:
        usage.all.add(tokens, wall_s, cpu_s, self._limit)
        if tokens == 1:
            usage.single.add(tokens, wall_s, cpu_s, self._limit)
        if (tokens == 1) != self._is_single:
            # What a prompt's tokens take says little of what single ones do.
            self._window, self._trial, self._is_single = Usage(), None, tokens == 1
        window = self._window
        window.add(tokens, wall_s, cpu_s, self.threads)
        trial = self._trial
        if trial is not None and self.threads > trial.before and wall_s > _FAILED_FACTOR * trial.token_s:
            self._conclude(trial, window)
            return
        is_short = self._is_single and window.steps < _WINDOW_STEPS and window.share >= _FULL_SHARE
        if window.wall_s < _WINDOW_S or is_short:
            return
        self._window = Usage()
        best_s = self._best_s[self._is_single]
        self._best_s[self._is_single] = min(best_s, window.token_s) if best_s else window.token_s
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
        elif self.threads < self._limit and (now >= self._blind_at or (now >= self._up_at and self._is_core_free())):
            self._blind_at = now + _BLIND_S
            self._try(self.threads + 1, window, gain=0.97)
            if not self._is_single:
                self._wait_longer()

    def _try(self, threads: int, window: Usage, gain: float) -> None:
        """Go on with another number of threads, on probation where like is compared with like."""
        self._trial = _Trial(self.threads, window.token_s, gain) if self._is_single else None
        self.threads = threads

    def _conclude(self, trial: _Trial, window: Usage) -> None:
        """Keep the number of threads if a token takes less time by it, else go back and wait longer than before."""
        is_more, self._trial, self._window = self.threads > trial.before, None, Usage()
        if window.token_s <= trial.gain * trial.token_s:
            self._hold_s = _FIRST_HOLD_S if is_more else self._hold_s
            return
        self.threads = trial.before
        if is_more:
            self._wait_longer()
        else:
            self._down_at = time.monotonic() + self._down_hold_s
            self._down_hold_s = min(2 * self._down_hold_s, _LONGEST_HOLD_S)

    def _is_core_free(self) -> bool:
        others = others_running()
        # Threads of the last step may still wait for the next one.
        return others is None or cores_left() - max(0, others - (self.threads - 1)) > self.threads

    def _wait_longer(self) -> None:
        self._up_at = time.monotonic() + self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)


def _others() -> int | None:
    """Threads that computed at each of up to three looks, 1 ms apart: those of long work, and no passing ones."""
    least = others_running()
    for _ in range(2):
        if not least:
            break
        time.sleep(0.001)
        least = min(least, others_running() or 0)
    return least


def _raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:
        return True
    return False
