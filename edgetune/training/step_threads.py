"""Adapts torch's threads while a training runs: fewer when other processes take the cores, more when they are free."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from edgetune_runtime.threads.count import ThreadCount
from edgetune_runtime.threads.machine import usable_cores

# Steps differ in length, so several are compared, and a wrong guess costs whole steps.
_WINDOW_STEPS = 3
_FIRST_HOLD_S, _LONGEST_HOLD_S = 20.0, 600.0


class StepThreads:
    """The threads of torch in a training on the CPU, at most as many as torch has and the process may use.

    torch's threads wait for each other as llama.cpp's do: beside one busy process a step took three times as long.
    """

    def __init__(self, *, is_cpu: bool) -> None:
        self._before = torch.get_num_threads()
        most = min(self._before, usable_cores())
        self._count = ThreadCount(
            most,
            adjusts=is_cpu,
            window_steps=_WINDOW_STEPS,
            first_hold_s=_FIRST_HOLD_S,
            longest_hold_s=_LONGEST_HOLD_S,
        )

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Measure what is computed inside, a step on so many tokens, and set the threads of the next one."""
        torch.set_num_threads(self._count.threads)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        yield
        wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        self._count.record(tokens, wall_s, cpu_s, even=True)

    def restore(self) -> None:
        """Give torch the threads that it had."""
        torch.set_num_threads(self._before)
