"""A queue of requests, first come first served, with limits on how many run and how many wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from edgetune_runtime.errors import BusyError


class AnswerQueue:
    """Lets `places` requests run at once and up to `max_waiting` wait; BusyError for one more, or when it stops."""

    def __init__(self, places: int, max_waiting: int) -> None:
        self.places, self._max_waiting = places, max_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self.stopping = False

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a place."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, limit_s: float) -> AsyncIterator[None]:
        """Run the block when its turn comes; BusyError if that takes longer than `limit_s` seconds."""
        if self.stopping:
            raise _stopping()
        if self.running < self.places:
            self.running += 1
        else:
            await self._wait(limit_s)
        try:
            yield
        finally:
            self._pass_on()

    def stop(self) -> None:
        """Refuse the requests that wait and all later ones."""
        self.stopping = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(_stopping())

    async def _wait(self, limit_s: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{len(self._waiting)} requests are already waiting", "try again later")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(limit_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # Its turn came in the same moment.
                self._pass_on()
            with suppress(ValueError):
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise BusyError(f"no place was free within {limit_s:.3g} s", "try again later") from error
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1


def _stopping() -> BusyError:
    return BusyError("the server is stopping", "try again later")
