"""Measures the memory bandwidth and the arithmetic of this machine with numpy, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgetune_runtime.threads.machine import free_mb

_SECONDS = 0.3
_MAX_BYTES, _MIN_BYTES = 256_000_000, 16_000_000
_SIDE = 384


def read_bandwidth(threads: int) -> float:
    """GB/s (10^9 bytes) that `threads` threads read from memory together; the best of several passes.

    Reads blocks of at most 256 MB, or an eighth of the free memory if that is less.
    """
    free = free_mb()
    total = _MAX_BYTES if free is None else max(_MIN_BYTES, min(_MAX_BYTES, int(free * 1e6 / 8)))
    blocks = np.array_split(np.ones(total // 4, np.float32), threads)
    # A maximum needs no addition after addition, so that only the memory limits it.
    return total / _best_seconds([block.max for block in blocks]) / 1e9


def arithmetic(threads: int) -> float:
    """GFLOP/s of float32 matrix products on `threads` threads together; a multiply-add counts as two operations."""
    matrix = np.ones((_SIDE, _SIDE), np.float32)
    product = [lambda: matrix @ matrix for _ in range(threads)]
    return threads * 2 * _SIDE**3 / _best_seconds(product) / 1e9


def _best_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """The shortest time in which all calls end that start together."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    with ThreadPoolExecutor(len(calls)) as pool:
        while best == float("inf") or time.perf_counter() < end:
            begin = time.perf_counter()
            for future in [pool.submit(call) for call in calls]:
                future.result()
            best = min(best, time.perf_counter() - begin)
    return best
