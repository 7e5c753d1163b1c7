"""The queue of requests: how many answers are computed at once, how many requests wait, and which one is next."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from edgetune_runtime.errors import BusyError

from .problems import StoppingError


class AnswerQueue:
    """Lets `places` requests run at once and up to `max_waiting` wait; BusyError for one more, or when it stops.

    First come, first served, but a client with fewer running answers is served before others, and the request that is
    one too many is the last one of the client with most of them: nobody can fill the queue alone.
    """

    def __init__(self, places: int, max_waiting: int) -> None:
        self.places, self._max_waiting = places, max_waiting
        # In the order of their turns, with their clients.
        self._waiting: dict[asyncio.Future[None], str] = {}
        self._running: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.stopping = False

    @property
    def running(self) -> int:
        """The number of requests that have a place."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a place."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, limit_s: float, client: str = "") -> AsyncIterator[None]:
        """Run the client's block when its turn comes; BusyError if that takes longer than `limit_s` seconds."""
        if self.stopping:
            raise StoppingError
        self._loop = asyncio.get_running_loop()
        if self.running < self.places:
            self._running[client] += 1
        else:
            await self._wait(limit_s, client)
        try:
            yield
        finally:
            self._pass_on(client)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Let another request run while the block of one that has a place computes nothing here. In any thread."""
        self._change_places(1)
        try:
            yield
        finally:
            self._change_places(-1)

    def stop(self) -> None:
        """Refuse the requests that wait and all later ones."""
        self.stopping = True
        while self._waiting:
            self._refuse(next(iter(self._waiting)), StoppingError())

    async def _wait(self, limit_s: float, client: str) -> None:
        if len(self._waiting) >= self._max_waiting:
            self._make_room(client)
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = client
        try:
            async with asyncio.timeout(limit_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # Its turn came in the same moment.
                self._pass_on(client)
            self._waiting.pop(turn, None)
            if isinstance(error, TimeoutError):
                raise BusyError(f"no place was free within {limit_s:.3g} s", "try again later") from error
            raise

    def _make_room(self, client: str) -> None:
        """Refuse the last waiting request of the client with most of them; BusyError if `client` has as many."""
        error = BusyError(f"{len(self._waiting)} requests are already waiting", "try again later")
        counts = Counter(self._waiting.values())
        crowd = max(counts, key=counts.__getitem__, default=client)
        if counts[crowd] <= counts[client] + 1:
            raise error
        self._refuse(next(turn for turn in reversed(self._waiting) if self._waiting[turn] == crowd), error)

    def _refuse(self, turn: asyncio.Future[None], error: BusyError) -> None:
        del self._waiting[turn]
        if not turn.done():
            turn.set_exception(error)

    def _change_places(self, by: int) -> None:
        def change() -> None:
            self.places += by
            self._call_next()

        # A loop that has ended has no more requests.
        with suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(change)

    def _pass_on(self, client: str) -> None:
        self._running[client] -= 1
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting and self.running < self.places:
            turn = min(self._waiting, key=lambda turn: self._running[self._waiting[turn]])
            next_client = self._waiting.pop(turn)
            if not turn.done():
                self._running[next_client] += 1
                turn.set_result(None)
        # So that the count does not keep each client that ever asked.
        self._running = +self._running
