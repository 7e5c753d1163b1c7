"""Runs the steps of engines: fewer threads while other processes take the cores, and an end to steps that stall.

Threads of a step wait for each other hundreds of times; when one of them is off its core, all the others wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from edgetune_runtime.engines.base import Engine, StepStopped
from edgetune_runtime.threads.count import ThreadCount, Usage
from edgetune_runtime.threads.watch import WATCH

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_STALL_FACTOR, _SHORTEST_STALL_S, _UNKNOWN_STALL_S = 3.0, 0.1, 0.5
"""A step that lacks cores is begun anew with fewer threads after this many times its usual time."""
_IDLE_S = 0.5
"""After such a pause what was found out about other processes is taken as outdated."""
_CHUNK_S, _SMALLEST_CHUNK = 0.25, 16
"""How long a chunk of a prompt may take where its length is free, and the fewest tokens that are worth a step."""
_SLOW_SHARE, _SLOW_FACTOR, _SLOW_STEPS = 0.75, 2.0, 4
"""An answer is slow below this share of the cores, or when tokens took this many times the shortest time seen."""


@dataclass
class AnswerUsage:
    """What the steps of one answer took, single tokens apart, as a prompt's tokens take less each."""

    all: Usage = field(default_factory=Usage)
    single: Usage = field(default_factory=Usage)


class Governor:
    """Runs the steps of the engines on one base, one at a time, with at most so many threads.

    Of an engine that does not adjust its threads, only steps whose call is to stop are ended.
    """

    def __init__(self, most: int, *, adjusts: bool) -> None:
        self._count = ThreadCount(most, adjusts=adjusts)
        self._adjusts = adjusts
        self._is_stalled = False
        self._ended = -_IDLE_S

    @property
    def threads(self) -> int:
        """Threads of the next step."""
        return self._count.threads

    def is_slow(self, usage: AnswerUsage) -> bool:
        """Whether an answer's steps lacked cores, or were much slower than the fastest ones seen."""
        single, best_s = usage.single, self._count.best_s(even=True)
        is_late = single.steps >= _SLOW_STEPS and single.token_s > _SLOW_FACTOR * best_s > 0
        return usage.all.share < _SLOW_SHARE or is_late

    def chunk(self, most: int) -> int:
        """Tokens of a prompt for one step, at most so many: half, a quarter … where steps are slow."""
        token_s, tokens = self._count.recent_s(even=False), most
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
        even: bool = False,
    ) -> T:
        """Compute one step, again if it stalls, and count it; `check` may end it by raising, the sequence as before.

        An `even` step decodes, and costs `tokens` times a step of one token; the others compute prompts.
        """
        if self._adjusts and time.monotonic() - self._ended > _IDLE_S:
            self._count.look_around()
        while True:
            if self._adjusts:
                engine.use_threads(self._count.threads)
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()

            def is_over(begin_s: float = begin_s, begin_cpu_s: float = begin_cpu_s) -> bool:
                return _raises(check) or self._stalls(tokens, begin_s, begin_cpu_s, even=even)

            try:
                with WATCH.over(is_over, engine.stop_step):
                    result = compute()
            except StepStopped:
                check()
                if self._is_stalled:
                    self._count.give_way()
                    _LOG.debug("a step lacked cores: computing it again with threads=%d", self._count.threads)
                continue
            finally:
                self._is_stalled = False
                self._ended = time.monotonic()
            wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
            self._record(tokens, wall_s, cpu_s, usage, even=even)
            return result

    def _stalls(self, tokens: float, begin_s: float, begin_cpu_s: float, *, even: bool) -> bool:
        """Whether the running step is far over its usual time, because its threads lack cores."""
        if not self._adjusts or self._count.threads == 1:
            return False
        wall_s = time.perf_counter() - begin_s
        usual_s = self._count.best_s(even=even) * tokens
        patience_s = max(_SHORTEST_STALL_S, _STALL_FACTOR * usual_s) if usual_s else _UNKNOWN_STALL_S
        self._is_stalled = wall_s >= patience_s and self._count.lacks_cores(wall_s, time.process_time() - begin_cpu_s)
        return self._is_stalled

    def _record(self, tokens: float, wall_s: float, cpu_s: float, usage: AnswerUsage, *, even: bool) -> None:
        usage.all.add(tokens, wall_s, cpu_s, self._count.limit)
        if even:
            usage.single.add(tokens, wall_s, cpu_s, self._count.limit)
        self._count.record(tokens, wall_s, cpu_s, even=even)


def _raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:
        return True
    return False
