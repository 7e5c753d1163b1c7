from __future__ import annotations

import pytest
from edgetune_runtime.threads.count import DECODE, PREFILL, SHARED, ThreadCount


def _impatient(most: int, monkeypatch: pytest.MonkeyPatch) -> ThreadCount:
    """One that waits for nothing before it tries again, on a machine where a core always seems to be free."""
    monkeypatch.setattr(ThreadCount, "_is_core_free", lambda _: True)
    return ThreadCount(most, window_steps=4, first_hold_s=0.0, longest_hold_s=0.0)


def _window(count: ThreadCount, token_s: float, share: float) -> int:
    """What is decided after steps of single tokens that took so long and had that share of their cores."""
    for _ in range(4):
        count.record(1, token_s, token_s * share * count.threads, DECODE)
        if not count._window.steps:
            break
    return count.threads


def test_fewer_threads_compute_while_others_take_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    count = _impatient(4, monkeypatch)
    assert _window(count, 0.02, share=1.0) == 4
    assert _window(count, 0.04, share=0.75) == 3
    assert _window(count, 0.03, share=1.0) == 3
    # One more is tried from time to time, and stays where it helps.
    assert _window(count, 0.03, share=1.0) == 4
    assert _window(count, 0.02, share=1.0) == 4


def test_a_number_of_threads_that_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    count = _impatient(2, monkeypatch)
    assert _window(count, 0.02, share=0.6) == 1
    assert _window(count, 0.03, share=1.0) == 2, "one thread was slower than two that shared their cores"
    assert _window(count, 0.04, share=0.6) == 1
    assert _window(count, 0.03, share=1.0) == 1
    assert _window(count, 0.03, share=1.0) == 2
    assert _window(count, 0.04, share=0.6) == 1, "two threads were slower than one"


def test_threads_of_uneven_steps_follow_the_cores_that_they_get(monkeypatch: pytest.MonkeyPatch) -> None:
    count = _impatient(4, monkeypatch)
    count.record(128, 0.4, 0.4 * 2.1, PREFILL)
    assert count.threads == 2
    count.record(22, 0.2, 0.2 * 2, PREFILL)
    assert count.threads == 3


def test_shared_steps_tell_how_many_cores_are_left_but_not_which_number_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = _impatient(4, monkeypatch)
    _window(count, 0.02, share=1.0)
    for _ in range(4):
        count.record(1, 0.06, 0.06 * 4 * 0.75, SHARED)
    assert count.threads == 3
    assert count.best_s(DECODE) == 0.02


def test_a_stall_halves_the_threads() -> None:
    count = ThreadCount(8)
    found = []
    for _ in range(4):
        count.halve()
        found.append(count.threads)
    assert found == [4, 2, 1, 1]


def test_no_more_threads_than_cores_are_left() -> None:
    count = ThreadCount(4096)
    count.start_over()
    assert 1 <= count.threads <= count.limit < 4096
