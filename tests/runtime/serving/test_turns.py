"""Who computes when, and with how many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from edgetune_runtime.limits import CallLimits, Stopped
from edgetune_runtime.serving.turns import _RECENT_S, Turn, Turns
from waiting import wait_for


class Calls:
    """Calls on threads of their own, which take a turn and keep it until they are told to end it."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.began: list[str] = []
        self.threads: dict[str, int] = {}
        self._ends: dict[str, threading.Event] = {}
        self._running: dict[str, threading.Thread] = {}

    def begin(self, *names: str, is_prompt: bool = False) -> None:
        """Let calls ask for a turn, one after the other; returns when all have asked."""
        for name in names:
            self._ends[name] = threading.Event()
            self._running[name] = threading.Thread(target=self._work, args=(name, is_prompt))
            before = self._asked()
            self._running[name].start()
            wait_for(lambda before=before: self._asked() > before)

    def end(self, *names: str) -> None:
        """End their turns."""
        for name in names:
            self._ends[name].set()
            self._running.pop(name).join()

    def close(self) -> None:
        for end in self._ends.values():
            end.set()
        for thread in self._running.values():
            thread.join()

    def _asked(self) -> int:
        return len(self.began) + len(self.turns._waiting)

    def _work(self, name: str, is_prompt: bool) -> None:
        with self.turns.take(is_prompt=is_prompt) as turn:
            self.threads[name] = turn.threads
            self.began.append(name)
            self._ends[name].wait()


@contextmanager
def _calls(most: int, *, shares: bool = True) -> Iterator[Calls]:
    calls = Calls(Turns(most, shares=shares))
    try:
        yield calls
    finally:
        calls.close()


def test_a_call_alone_has_all_threads_and_the_next_ones_divide_them() -> None:
    with _calls(4) as calls:
        calls.begin("first", "second", "third")
        assert calls.threads == {"first": 4}, "the others wait for the end of its step"
        calls.end("first")
        wait_for(lambda: len(calls.began) == 3)
        # "first" only just ended, and is expected back.
        assert calls.threads == {"first": 4, "second": 2, "third": 1}
        calls.begin("first")
        assert calls.threads["first"] == 1
        calls.end("first", "second", "third")
        time.sleep(2 * _RECENT_S)
        calls.begin("last")
        wait_for(lambda: "last" in calls.threads)
        assert calls.threads["last"] == 4


def test_calls_beyond_the_number_of_threads_wait_in_the_order_of_asking() -> None:
    with _calls(2) as calls:
        names = [str(number) for number in range(6)]
        calls.begin(*names)
        assert calls.began == ["0"]
        for ended in range(6):
            calls.end(str(ended))
            expected = names[: min(6, ended + 3)]
            wait_for(lambda expected=expected: len(calls.began) == len(expected))
            assert sorted(calls.began) == expected
    assert calls.threads == {"0": 2} | dict.fromkeys(names[1:], 1)


@pytest.mark.parametrize(
    ("patience_s", "expected"), [(60.0, ["first", "answer", "prompt"]), (0.0, ["first", "prompt", "answer"])]
)
def test_steps_of_answers_go_before_those_of_prompts_for_a_while(
    patience_s: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune_runtime.serving.turns._PATIENCE_S", patience_s)
    with _calls(1) as calls:
        calls.begin("first")
        calls.begin("prompt", is_prompt=True)
        calls.begin("answer")
        for count, name in enumerate(expected, 1):
            wait_for(lambda count=count: len(calls.began) == count)
            assert calls.began == expected[:count]
            calls.end(name)


def test_where_threads_cannot_be_divided_one_computes_at_a_time() -> None:
    with _calls(4, shares=False) as calls:
        calls.begin("first", "second", "third")
        assert calls.began == ["first"]
        calls.end("first")
        wait_for(lambda: len(calls.began) == 2)
        assert calls.began == ["first", "second"]
        assert calls.threads == {"first": 4, "second": 4}


def test_several_calls_get_a_core_each_even_while_other_processes_use_some() -> None:
    with _calls(4) as calls:
        calls.turns.divide(alone=1, limit=4)
        calls.begin("first", "second", "third")
        wait_for(lambda: len(calls.began) == 3)
        assert calls.threads == {"first": 1, "second": 1, "third": 1}


def test_a_call_that_stops_while_it_waits_does_not_keep_its_place() -> None:
    with _calls(1) as calls:
        calls.begin("first")
        with pytest.raises(Stopped, match="deadline"), calls.turns.take(CallLimits(0.1).check):
            raise AssertionError("the turn of another call")
        calls.begin("second")
        calls.end("first")
        wait_for(lambda: calls.began == ["first", "second"])
        calls.end("second")
        assert calls.turns.is_idle


@pytest.mark.parametrize("method", ["_part", "_count"])
def test_a_call_that_is_interrupted_while_it_asks_leaves_no_turn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1, shares=True)

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, method, interrupt)
    with pytest.raises(KeyboardInterrupt), turns.take():
        raise AssertionError("a turn in spite of the interrupt")
    assert turns.is_idle
    with turns.take(CallLimits(10).check):
        pass


def test_a_turn_that_an_interrupt_left_is_dropped_when_its_thread_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1, shares=True)

    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), turns.take():
        monkeypatch.setattr(turns, "_count", interrupt)
    with turns.take(CallLimits(1).check):
        pass
    assert turns.is_idle


def test_core_seconds_are_those_of_all_turns_together() -> None:
    turns = Turns(2, shares=True)
    with turns.take():
        time.sleep(0.02)
    alone = turns.core_s()
    assert alone >= 2 * 0.02
    time.sleep(0.02)
    assert turns.core_s() == alone, "nobody computed"
    with _calls(2) as calls:
        calls.begin("first", "second")
        calls.end("first")
        # Other processes may take the core between two clocks.
        before_s, begin, begin_s = time.perf_counter(), calls.turns.core_s(), time.perf_counter()
        calls.begin("third")
        time.sleep(0.02)
        took = time.perf_counter() - begin_s
        assert took <= calls.turns.core_s() - begin <= 2 * (time.perf_counter() - before_s)


def test_a_turn_is_shared_once_another_call_computes_beside_it() -> None:
    turns, seen = Turns(2, shares=True), threading.Event()
    turns.divide(alone=1, limit=2)
    with turns.take() as mine:
        assert mine == Turn(1, is_shared=False)

        def beside() -> None:
            with turns.take() as other:
                assert other.is_shared
                seen.set()

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        assert seen.is_set()
        assert mine.is_shared
