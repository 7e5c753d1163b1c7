"""Calls of code that may never end."""

from __future__ import annotations

import asyncio
import time

from edgetune_runtime.server.daemon_threads import DaemonThreads


def test_calls_whose_tasks_are_cancelled_can_be_waited_for() -> None:
    ended = []

    def log(number: int) -> None:
        time.sleep(0.05)
        ended.append(number)

    async def run() -> None:
        threads = DaemonThreads("the log", threads=2, waiting=64)
        tasks = [asyncio.create_task(threads.call(log, number)) for number in range(4)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await threads.ended(30)

    asyncio.run(run())
    assert sorted(ended) == [0, 1, 2, 3]
