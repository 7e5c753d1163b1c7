"""Run the steps of engines with fewer threads while other processes use the cores, and stop steps that stall.

The threads of a step synchronize hundreds of times; when one of them loses its core, all the others wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from edgetune_runtime.engines.base import Engine, StepStopped
from edgetune_runtime.threads.count import DECODE, FULL_SHARE, PREFILL, SHARED, Kind, ThreadCount, Usage
from edgetune_runtime.threads.enough import EnoughThreads
from edgetune_runtime.threads.watch import WATCH

from .turns import Turn, Turns

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_STALL_FACTOR, _SHORTEST_STALL_S, _UNKNOWN_STALL_S = 3.0, 0.1, 0.5
"""A step that lacks cores is restarted with fewer threads after this factor of its usual time, but not before the
shortest time; after the last value if the usual time is unknown."""
_IDLE_S = 0.5
"""After a pause of this length, measurements of other processes are outdated."""
_CHUNK_S, _SMALLEST_CHUNK = 0.25, 16
"""Longest time for a prompt chunk whose size may vary, and the smallest chunk in tokens."""
_SLOW_SHARE, _SLOW_FACTOR, _SLOW_STEPS = 0.75, 2.0, 4
"""An answer is slow if it got less than this share of its cores, or if its decode steps (at least this many) took this
factor of the shortest time so far."""


@dataclass
class AnswerUsage:
    """Time used by the steps of one answer: all steps, and decode steps that no other call shared the cores with."""

    all: Usage = field(default_factory=Usage)
    decode: Usage = field(default_factory=Usage)


@dataclass
class Step:
    """A step of `tokens` tokens, and its threads: those of its turn, or fewer where more would not make it faster."""

    turn: Turn
    threads: int
    tokens: float
    kind: Kind


class Clock:
    """Wall time of a step since its start, and the CPU time that its threads got of it.

    CPU time is measured for the whole process: of several calls at the same time, each gets its threads' part of it.
    """

    def __init__(self, turns: Turns, turn: Turn) -> None:
        self._turns, self._turn = turns, turn
        self._begin_s, self._begin_cpu_s, self._begin_core_s = time.perf_counter(), time.process_time(), turns.core_s()

    def read(self) -> tuple[float, float]:
        """Seconds of wall and CPU time."""
        wall_s, cpu_s = time.perf_counter() - self._begin_s, time.process_time() - self._begin_cpu_s
        if self._turn.is_shared and (core_s := self._turns.core_s() - self._begin_core_s):
            cpu_s *= self._turn.threads * wall_s / core_s
        return wall_s, cpu_s


class Governor:
    """Runs the steps of the engines on one base with at most `max_threads` threads together.

    With `adjusts=False` a step has all threads, one step runs at a time, and it is stopped only when its call should
    stop.
    """

    def __init__(self, max_threads: int, *, adjusts: bool, turns: Turns | None = None) -> None:
        self._max_threads = max_threads
        self._count = ThreadCount(max_threads, adjusts=adjusts)
        self._enough = EnoughThreads()
        self._turns = turns or Turns(max_threads, shares=adjusts)
        self._adjusts = adjusts
        self._lock = threading.Lock()
        self._used = -_IDLE_S

    @property
    def threads(self) -> int:
        """Threads of the next step of a call alone; single tokens may have fewer."""
        return self._count.threads

    def beside(self) -> Governor:
        """The governor of another model, whose steps take their turns with those of this one's model."""
        return Governor(self._max_threads, adjusts=self._adjusts, turns=self._turns)

    def is_slow(self, usage: AnswerUsage) -> bool:
        """Whether an answer's steps lacked cores or were much slower than the fastest ones so far."""
        decode, best_s = usage.decode, self._count.best_s(DECODE)
        is_late = decode.steps >= _SLOW_STEPS and decode.token_s > _SLOW_FACTOR * best_s > 0
        return usage.all.share < _SLOW_SHARE or is_late

    def chunk(self, max_tokens: int) -> int:
        """Tokens of a prompt per step: `max_tokens`, or half, a quarter … of it when steps are slow."""
        token_s, tokens = self._count.recent_s(PREFILL), max_tokens
        while tokens > _SMALLEST_CHUNK and tokens * token_s > _CHUNK_S:
            tokens //= 2
        return tokens

    def step(
        self,
        engine: Engine,
        tokens: float,
        compute: Callable[[], T],
        check: Callable[[], None],
        usage: AnswerUsage,
        *,
        kind: Kind = PREFILL,
    ) -> T:
        """Wait for a turn and compute one step, again if it stalls.

        `check` stops it by raising, which leaves the sequence unchanged. A step that decodes costs as much as `tokens`
        single-token steps.
        """
        while True:
            self._divide()
            with self._turns.take(check, is_prompt=kind == PREFILL) as turn:
                step = Step(turn, self._threads(turn, tokens, kind), tokens, kind)
                if self._adjusts:
                    engine.use_threads(step.threads)
                clock, stalled = Clock(self._turns, turn), threading.Event()

                def should_stop(step: Step = step, clock: Clock = clock, stalled: threading.Event = stalled) -> bool:
                    if self._stalls(step, clock):
                        stalled.set()
                    return stalled.is_set() or _raises(check)

                try:
                    with WATCH.watching(should_stop, engine.stop_step):
                        result = compute()
                except StepStopped:
                    check()
                    if stalled.is_set():
                        self._halve(step)
                    continue
                finally:
                    self._used = time.monotonic()
                self._record(step, clock.read(), usage)
                return result

    def _threads(self, turn: Turn, tokens: float, kind: Kind) -> int:
        if not self._adjusts or turn.is_shared or (tokens, kind) != (1, DECODE):
            return turn.threads
        with self._lock:
            return self._enough.of(turn.threads)

    def _divide(self) -> None:
        """Look at what other processes use after a pause, and let the turns have the threads that are left."""
        with self._lock:
            if self._adjusts and self._turns.is_idle and time.monotonic() - self._used > _IDLE_S:
                self._count.start_over()
            self._used = time.monotonic()
            self._turns.divide(self._count.threads, self._count.limit)

    def _stalls(self, step: Step, clock: Clock) -> bool:
        """Whether the running step takes far longer than usual because its threads lack cores."""
        turn, threads = step.turn, step.threads
        if not self._adjusts or threads == 1:
            return False
        wall_s, cpu_s = clock.read()
        usual_s = self._count.best_s(step.kind) * step.tokens * (self._count.limit / threads if turn.is_shared else 1)
        patience_s = max(_SHORTEST_STALL_S, _STALL_FACTOR * usual_s) if usual_s else _UNKNOWN_STALL_S
        return wall_s >= patience_s and cpu_s < FULL_SHARE * threads * wall_s

    def _halve(self, step: Step) -> None:
        with self._lock:
            self._count.halve()
        _LOG.debug("a step of %d threads lacked cores, restarting it with fewer", step.threads)

    def _record(self, step: Step, times_s: tuple[float, float], usage: AnswerUsage) -> None:
        (wall_s, cpu_s), tokens, threads = times_s, step.tokens, step.threads
        with self._lock:
            # Only the share of the cores that it got says something about all threads.
            of_all_s = cpu_s / threads * self._count.threads
            if step.turn.is_shared:
                usage.all.add(tokens, wall_s, cpu_s, threads)
                self._count.record(tokens, wall_s, of_all_s, SHARED)
                return
            requested = self._count.limit if threads == step.turn.threads else threads
            usage.all.add(tokens, wall_s, cpu_s, requested)
            if step.kind == DECODE:
                usage.decode.add(tokens, wall_s, cpu_s, requested)
                if tokens == 1:
                    self._enough.record(threads, wall_s, cpu_s / (threads * wall_s))
            self._count.record(tokens, wall_s, of_all_s, step.kind)


def _raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:
        return True
    return False
