from __future__ import annotations

from collections.abc import Callable

import pytest
from edgetune_runtime.threads.enough import EnoughThreads

STEPS = 24
"""Of one trial."""


def _after(
    enough: EnoughThreads, steps: int, time_s: Callable[[int], float], *, most: int = 4, share: float = 1
) -> int:
    """The usual number of threads after steps of single tokens that take so long with each number."""
    for _ in range(steps):
        threads = enough.of(most)
        enough.record(threads, time_s(threads), share)
    return enough.of(most)


@pytest.fixture
def enough() -> EnoughThreads:
    """One that waits for nothing before its next trial."""
    return EnoughThreads(first_hold_s=0.0, longest_hold_s=0.0)


def test_fewer_threads_compute_where_more_only_wait_for_each_other(enough: EnoughThreads) -> None:
    assert _after(enough, 2 * STEPS, lambda threads: 5.0 + threads) == 2
    assert _after(enough, STEPS, lambda threads: 5.0 + threads) == 1


def test_all_threads_compute_where_each_one_helps(enough: EnoughThreads) -> None:
    used: list[int] = []
    for _ in range(10 * STEPS):
        used.append(enough.of(4))
        enough.record(used[-1], 1 / used[-1], 1.0)
    assert enough.of(4) == 4
    assert set(used) == {3, 4}


def test_more_threads_compute_again_once_they_help(enough: EnoughThreads) -> None:
    assert _after(enough, 3 * STEPS, lambda threads: 5.0 + threads) == 1
    assert _after(enough, 12 * STEPS, lambda threads: 1 / threads) == 4


def test_slow_first_steps_with_a_number_of_threads_do_not_count(enough: EnoughThreads) -> None:
    for step in range(STEPS):
        threads = enough.of(2)
        enough.record(threads, 100.0 if step % 4 == 0 and threads == 1 else threads, 1.0)
    assert enough.of(2) == 1


def test_nothing_is_learned_while_other_processes_take_the_cores(enough: EnoughThreads) -> None:
    assert _after(enough, STEPS, lambda threads: 5.0 + threads, share=0.5) == 4


def test_a_trial_ends_when_the_number_of_cores_changes(enough: EnoughThreads) -> None:
    _after(enough, STEPS // 2, lambda threads: 5.0 + threads)
    assert _after(enough, 1, lambda threads: 5.0 + threads, most=2) == 2


def test_trials_that_change_nothing_become_rare() -> None:
    enough = EnoughThreads(first_hold_s=1e6, longest_hold_s=1e9)
    used: list[int] = []
    for _ in range(5 * STEPS):
        used.append(enough.of(4))
        enough.record(used[-1], 1 / used[-1], 1.0)
    assert used.count(3) == STEPS // 2
