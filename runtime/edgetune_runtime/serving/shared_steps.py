"""Collects the steps of calls that run at the same time, and computes those that fit together as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgetune_runtime.engines.base import Batch, Engine
from edgetune_runtime.limits import Stopped
from edgetune_runtime.threads.count import Kind
from edgetune_runtime.threads.priority import ComputeThreads

from .governor import AnswerUsage, Governor
from .turns import POLL_S

_LONGEST_PAUSE_S, _PAUSE_SHARE = 0.005, 0.25
"""How long a step waits for the calls of the last one to come back: at most so long, and this share of its time."""


@dataclass(frozen=True)
class Token:
    """A call's part of a step of several, which `batch` computes; `cost` gives that of a number of tokens."""

    batch: Batch
    token: int
    cost: Callable[[int], float]


@dataclass(eq=False)
class Step:
    """A step of a call, which `compute` computes alone at `cost`; if it is one of a `token`, with others."""

    engine: Engine
    compute: Callable[[], Any]
    cost: float
    check: Callable[[], None]
    usage: AnswerUsage
    kind: Kind
    token: Token | None = None
    result: Any = None
    error: BaseException | None = None
    is_done: bool = False


class SharedSteps:
    """Computes the steps of engines that share a batch: one at a time, in the order in which they came.

    A step of one token is computed with all that wait, on the thread of the first call. Calls that were in such a step
    are expected back at once, so the next one waits for them for a moment. The limits of a call end its own wait; the
    step that is computed on its thread is stopped by them, and the tokens of others wait for the next one.
    """

    def __init__(self, governor: Governor, threads: ComputeThreads | None = None) -> None:
        self._governor, self._threads = governor, threads
        self._changed = threading.Condition()
        self._waiting: list[Step] = []
        self._is_computing = False
        self._absent: set[Engine] = set()
        self._patient_until_s = 0.0

    def run(self, step: Step) -> Any:  # noqa: ANN401 - what `step.compute` returns
        """Compute a step, alone or with others; what its `check` raises, which leaves the sequence unchanged."""
        with self._changed:
            self._waiting.append(step)
            self._absent.discard(step.engine)
            self._changed.notify_all()
        while not step.is_done:
            try:
                together = self._next(step)
            except BaseException as error:
                # While another thread computes it, its sequence is not unchanged; the next check raises again.
                if self._withdraw(step) or not isinstance(error, Stopped):
                    raise
                continue
            if together:
                self._compute(together)
        if step.error is not None:
            raise step.error
        return step.result

    def _next(self, step: Step) -> list[Step]:
        """Wait until a step is done, or until its thread has to compute the returned steps."""
        while True:
            with self._changed:
                if step.is_done:
                    return []
                pause_s = POLL_S
                if not self._is_computing and self._waiting[0] is step:
                    pause_s = self._pause_s(step)
                    if pause_s <= 0:
                        return self._begin(step)
                self._changed.wait(min(pause_s, POLL_S))
                if step not in self._waiting:
                    continue
            step.check()

    def _pause_s(self, step: Step) -> float:
        """How long the next step waits for calls that may join it. Call it with the lock, as `_begin`."""
        if step.token is None or not self._absent:
            return 0.0
        return self._patient_until_s - time.monotonic()

    def _begin(self, step: Step) -> list[Step]:
        self._is_computing = True
        joins = step.token is not None
        together = [other for other in self._waiting if other is step or (joins and other.token is not None)]
        self._waiting = [other for other in self._waiting if other not in together]
        return together

    def _withdraw(self, step: Step) -> bool:
        """Take back a step; False if another thread computes it, or has."""
        with self._changed:
            is_waiting = step in self._waiting
            if is_waiting:
                self._waiting.remove(step)
            self._changed.notify_all()
        return is_waiting

    def _compute(self, steps: Sequence[Step]) -> None:
        first, begin_s = steps[0], time.monotonic()
        cost, compute = first.cost, lambda: [first.compute()]
        if len(steps) > 1 and first.token is not None:
            cost, compute = first.token.cost(len(steps)), partial(_together, first.token.batch, steps)
        run = compute if self._threads is None else partial(self._threads.run, compute)
        usages = [step.usage for step in steps]
        try:
            results = self._governor.step(first.engine, cost, run, first.check, *usages, kind=first.kind, call=id(self))
        except BaseException as error:
            is_own = len(steps) == 1 or isinstance(error, Stopped) or not isinstance(error, Exception)
            self._end([first] if is_own else [], again=steps[1:] if is_own else steps, alone=not is_own, error=error)
            return
        for step, result in zip(steps, results, strict=True):
            step.result = result
        self._end(steps, took_s=time.monotonic() - begin_s)

    def _end(
        self,
        done: Sequence[Step],
        *,
        again: Sequence[Step] = (),
        alone: bool = False,
        error: BaseException | None = None,
        took_s: float = 0.0,
    ) -> None:
        """End the steps that are `done`; those to compute `again` go before all others, `alone` if one failed."""
        with self._changed:
            for step in done:
                step.is_done, step.error = True, error
            for step in again:
                step.token = None if alone else step.token
            self._waiting[:0] = again
            self._is_computing = False
            self._absent = {step.engine for step in done if step.token is not None and error is None}
            self._patient_until_s = time.monotonic() + min(_LONGEST_PAUSE_S, _PAUSE_SHARE * took_s)
            self._changed.notify_all()


def _together(batch: Batch, steps: Sequence[Step]) -> list[Any]:
    """The logits after the token of each step, [1, vocab]."""
    return list(batch.decode([(step.engine, step.token.token) for step in steps if step.token is not None]))
