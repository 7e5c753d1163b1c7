"""Adjusts torch's threads during training: fewer while other processes use the cores, more when the cores are free."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from edgetune_runtime.threads.count import DECODE, ThreadCount
from edgetune_runtime.threads.machine import usable_cores

# Steps differ in length, so several are compared; a wrong choice slows down whole steps.
_WINDOW_STEPS = 3
_FIRST_HOLD_S, _LONGEST_HOLD_S = 20.0, 600.0


class StepThreads:
    """Thread count of torch during training on the CPU, at most torch's own and the cores the process may use.

    torch's threads wait for each other, as llama.cpp's do: with one other busy process, a step took three times as
    long.
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
        """Measure the step of `tokens` tokens that runs in the block, and adjust the threads for the next one."""
        torch.set_num_threads(self._count.threads)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        yield
        wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        self._count.record(tokens, wall_s, cpu_s, DECODE)

    def restore(self) -> None:
        """Restore torch's thread count."""
        torch.set_num_threads(self._before)
