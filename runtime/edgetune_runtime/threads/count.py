"""Choose the number of compute threads from their share of the cores and from the time per token.

The share is the process's CPU time over wall time and threads. If it is low, fewer threads are tried; if a core seems
to be free, one more thread is tried. The measured time per token decides which number is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from .machine import cores_left, others_running

Kind = Literal["decode", "prefill", "shared"]
"""Steps that decode, or train: their tokens all cost the same; steps that prefill prompts; and steps that are computed
beside others of this process."""
DECODE: Kind = "decode"
PREFILL: Kind = "prefill"
SHARED: Kind = "shared"

_WINDOW_S = 0.05
"""Shortest time to measure before a decision."""
FULL_SHARE = 0.85
"""Below this share, the threads were waiting for other processes."""
_BLIND_HOLDS = 2
"""One more thread is tried after this many longest holds even if no core seems to be free."""
_FAILED_FACTOR = 2.0
"""A single step that takes this many times longer per token than before ends a trial."""


@dataclass
class Usage:
    """Totals over steps: seconds of wall and CPU time, core-seconds requested, steps and tokens."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    requested_s: float = 0.0
    steps: int = 0
    tokens: float = 0.0

    def add(self, tokens: float, wall_s: float, cpu_s: float, threads: int) -> None:
        """Add a step that requested `threads` cores."""
        self.wall_s += wall_s
        self.cpu_s += cpu_s
        self.requested_s += wall_s * threads
        self.steps += 1
        self.tokens += tokens

    @property
    def share(self) -> float:
        """The share of the requested core time that was received; 1 before the first step."""
        return self.cpu_s / self.requested_s if self.requested_s else 1.0

    @property
    def token_s(self) -> float:
        """Seconds per token."""
        return self.wall_s / max(1.0, self.tokens)


@dataclass
class _ThreadTrial:
    """A trial of another number of threads: the number before, its seconds per token, and the ratio to reach."""

    before: int
    token_s: float
    gain: float


class ThreadCount:
    """The number of compute `threads`, limited by `max_threads` and by the available cores (`limit`).

    A window of measurements has at least `window_steps` steps, or fewer if the threads lack cores. A number of threads
    that did not help is tried again after `first_hold_s`, doubled each time up to `longest_hold_s`. With
    `adjusts=False` the number is fixed and only measured.
    """

    def __init__(
        self,
        max_threads: int,
        *,
        adjusts: bool = True,
        window_steps: int = 4,
        first_hold_s: float = 0.1,
        longest_hold_s: float = 4.0,
    ) -> None:
        self.max_threads = self.threads = self.limit = max_threads
        self._adjusts = adjusts
        self._window_steps = window_steps
        self._first_hold_s, self._longest_hold_s = first_hold_s, longest_hold_s
        self._window = Usage()
        self._kind: Kind = PREFILL
        self._trial: _ThreadTrial | None = None
        self._best_s: dict[Kind, float] = {}
        self._recent_s: dict[Kind, float] = {}
        self._hold_s = self._down_hold_s = first_hold_s
        self._up_at = self._down_at = self._blind_at = 0.0
        self._reset_holds()

    def start_over(self) -> None:
        """Start again with as many threads as there are free cores, as a first guess."""
        left, others = cores_left(), _others()
        self.limit = min(self.max_threads, left)
        self.threads = self.limit if others is None else max(1, min(self.limit, left - others))
        self._window, self._trial = Usage(), None
        self._reset_holds()

    def best_s(self, kind: Kind) -> float:
        """Seconds per token of the fastest window of steps of a kind, 0 before the first."""
        return self._best_s.get(kind, 0.0)

    def recent_s(self, kind: Kind) -> float:
        """Seconds per token of the last window of steps of a kind, 0 before the first."""
        return self._recent_s.get(kind, 0.0)

    def halve(self) -> None:
        """Halve the number of threads after a stalled step."""
        self.threads = max(1, self.threads // 2)
        self._window, self._trial = Usage(), None
        self._back_off()

    def record(self, tokens: float, wall_s: float, cpu_s: float, kind: Kind) -> None:
        """Record a step. Only steps that decode are used to compare numbers of threads by the time per token."""
        if kind != self._kind:
            self._window, self._trial, self._kind = Usage(), None, kind
        window, trial = self._window, self._trial
        window.add(tokens, wall_s, cpu_s, self.threads)
        is_more = trial is not None and self.threads > trial.before
        if trial is not None and is_more and wall_s > _FAILED_FACTOR * trial.token_s * tokens:
            self._end_trial(trial, window)
            return
        is_short = kind != PREFILL and window.steps < self._window_steps and window.share >= FULL_SHARE
        if window.wall_s < _WINDOW_S or is_short:
            return
        self._window = Usage()
        self._recent_s[kind] = window.token_s
        self._best_s[kind] = min(self._best_s.get(kind, window.token_s), window.token_s)
        if self._adjusts:
            self._decide(window)

    def _decide(self, window: Usage) -> None:
        """End a running trial; else start one with fewer threads or with one more."""
        now = time.monotonic()
        if self._trial is not None:
            self._end_trial(self._trial, window)
        elif self.threads > 1 and window.share < FULL_SHARE:
            if now >= self._down_at:
                received = int(window.share * self.threads + 0.2)
                self._start_trial(max(1, min(received, self.threads - 1)), window, gain=1.0)
                self._up_at = now + self._hold_s
        elif self.threads < self.limit and (now >= self._blind_at or (now >= self._up_at and self._is_core_free())):
            self._blind_at = now + _BLIND_HOLDS * self._longest_hold_s
            self._start_trial(self.threads + 1, window, gain=0.97)
            if self._kind != DECODE:
                self._back_off()

    def _start_trial(self, threads: int, window: Usage, gain: float) -> None:
        """Change the number of threads, as a trial if the steps decode."""
        self._trial = _ThreadTrial(self.threads, window.token_s, gain) if self._kind == DECODE else None
        self.threads = threads

    def _end_trial(self, trial: _ThreadTrial, window: Usage) -> None:
        """Keep the new number of threads if it was faster per token; else go back, and wait longer before a retry."""
        is_more, self._trial, self._window = self.threads > trial.before, None, Usage()
        if window.token_s <= trial.gain * trial.token_s:
            self._hold_s = self._first_hold_s if is_more else self._hold_s
            return
        self.threads = trial.before
        if is_more:
            self._back_off()
        else:
            self._down_at = time.monotonic() + self._down_hold_s
            self._down_hold_s = min(2 * self._down_hold_s, self._longest_hold_s)

    def _is_core_free(self) -> bool:
        others = others_running()
        # Our own threads of the last step may still be spinning.
        return others is None or cores_left() - max(0, others - (self.threads - 1)) > self.threads

    def _back_off(self) -> None:
        self._up_at = time.monotonic() + self._hold_s
        self._hold_s = min(2 * self._hold_s, self._longest_hold_s)

    def _reset_holds(self) -> None:
        """Allow all trials from now on, except one more thread when no core seems to be free."""
        self._hold_s = self._down_hold_s = self._first_hold_s
        self._up_at = self._down_at = 0.0
        self._blind_at = time.monotonic() + _BLIND_HOLDS * self._longest_hold_s


def _others() -> int | None:
    """The smallest of up to three samples of other running threads, 1 ms apart, to leave out short-lived ones."""
    fewest = others_running()
    for _ in range(2):
        if not fewest:
            break
        time.sleep(0.001)
        fewest = min(fewest, others_running() or 0)
    return fewest
