from __future__ import annotations

import threading

import pytest
from edgetune_runtime.threads.watch import Watch

MOST_S = 30


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("can't start new thread")])
def test_a_step_that_could_not_begin_is_not_watched_and_the_next_one_is(
    error: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, stopped, others = Watch(), threading.Event(), threading.Event()

    def refuse(_thread: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, RuntimeError)):
        patch.setattr(threading.Thread, "start", refuse)
        with watch.watching(lambda: True, others.set):
            pytest.fail("the step began")
    with watch.watching(lambda: True, stopped.set):
        assert stopped.wait(MOST_S)
    assert not others.is_set()
