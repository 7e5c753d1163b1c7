from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainings import QUIET, Listening
from waiting import wait_for

from edgetune.common.waiting_lock import waiting_lock


def test_only_whoever_has_to_wait_says_so(tmp_path: Path) -> None:
    listening, entered = Listening(), threading.Event()

    def second() -> None:
        with waiting_lock(tmp_path / "lock", listening):
            entered.set()

    with ThreadPoolExecutor(1) as threads:
        with waiting_lock(tmp_path / "lock", QUIET):
            waiting = threads.submit(second)
            wait_for(lambda: listening.lines)
            assert not entered.is_set()
        waiting.result(30)
    assert listening.lines == [f"waiting for another process that uses {tmp_path}"]
