"""A bounded number of daemon threads for calls that may take long or never end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from edgetune_runtime.errors import BusyError
from edgetune_runtime.inference.asynchronous import call_in_thread

T = TypeVar("T")


class DaemonThreads:
    """Runs calls of `owner` on at most `threads` threads at once, while at most `waiting` more wait for one.

    Not asyncio's threads, which all requests share and which the process waits for when it exits.
    """

    def __init__(self, owner: str, threads: int, waiting: int = 0) -> None:
        self._owner, self._most = owner, threads + waiting
        self._free = asyncio.Semaphore(threads)
        self._calls: set[asyncio.Task[object]] = set()

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What the function returns or raises, an Exception; BusyError if too many calls have not ended.

        A task that stops waiting does not end the call, which counts until it ends.
        """
        if len(self._calls) >= self._most:
            raise BusyError(f"{self._owner} has {len(self._calls)} calls that have not ended", "try again later")
        call = asyncio.ensure_future(self._run(partial(function, *arguments)))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.shield(call)

    async def ended(self, limit_s: float) -> None:
        """Wait until all calls have ended, at most so many seconds."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=limit_s)

    async def _run(self, function: Callable[[], T]) -> T:
        async with self._free:
            return await call_in_thread(function, "edgetune-serve", daemon=True)
