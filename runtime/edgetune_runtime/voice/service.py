"""A Wyoming service that handles intents: a transcript in, the adapter's answer out.

Protocol: https://github.com/OHF-Voice/wyoming. Home Assistant's Wyoming integration makes a conversation agent of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from wyoming.asr import Transcript
from wyoming.event import Event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop, NotHandled
from wyoming.info import Attribution, Describe, HandleModel, HandleProgram, Info
from wyoming.ping import Ping, Pong
from wyoming.server import AsyncEventHandler

from edgetune_runtime import __version__
from edgetune_runtime.asynchronous import AsyncRuntime
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.runtime import Runtime

_LOG = logging.getLogger(__name__)

MOST_BYTES = 1 << 16
"""Size of the largest event that is read: a transcript is short, and no audio is wanted."""


@dataclass(frozen=True)
class Service:
    """What answers: a runtime, one of its adapters (None: the base), and limits per answer."""

    runtime: AsyncRuntime
    adapter: str | None
    languages: tuple[str, ...]
    max_tokens: int
    deadline_s: float

    def info(self) -> Info:
        """What a client is told about the service."""
        name = self.runtime.manifest.name
        source = Attribution(name="edgetune", url="")
        model = HandleModel(
            name=self.adapter or name,
            attribution=source,
            installed=True,
            description=f"{self.adapter} of {name}" if self.adapter else name,
            version=None,
            languages=list(self.languages),
        )
        program = HandleProgram(
            name="edgetune",
            attribution=source,
            installed=True,
            description="Small language models with an adapter per task",
            version=__version__,
            models=[model],
            supports_handled_streaming=True,
        )
        return Info(handle=[program])


def serve(
    runtime: Runtime, listening: socket.socket, make: Callable[[AsyncRuntime], Service], ready: Callable[[], None]
) -> None:
    """Answer clients on a socket until SIGTERM or SIGINT, then close the socket. The runtime stays open."""
    with suppress(asyncio.CancelledError):
        asyncio.run(run(make(AsyncRuntime(runtime)), listening, ready))


async def run(service: Service, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer clients until the task is cancelled."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await Connection(service, reader, writer).run()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # The client left, or sent what is no event: the library does not check the fields of one.
            _LOG.info("a connection ended: %s", error)
        finally:
            connections.discard(task)

    server = await asyncio.start_server(connected, sock=listening, limit=MOST_BYTES)
    serving = asyncio.current_task()
    assert serving is not None
    # Not on Windows, and not outside the main thread.
    with suppress(NotImplementedError, RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    try:
        ready()
        await server.serve_forever()
    finally:
        server.close()
        for task in connections:
            task.cancel()


class Connection(AsyncEventHandler):
    """One client."""

    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The library reads as many bytes as an event announces.
        reader.readexactly = partial(_read_exactly, reader.readexactly)  # type: ignore[method-assign]
        super().__init__(reader, writer)
        self._service = service

    async def handle_event(self, event: Event) -> bool:
        """Answer a transcript, a question about the service, or a ping; ignore other events."""
        if Transcript.is_type(event.type):
            await self._answer(Transcript.from_event(event))
        elif Describe.is_type(event.type):
            await self.write_event(self._service.info().event())
        elif Ping.is_type(event.type):
            await self.write_event(Pong(text=Ping.from_event(event).text).event())
        return True

    async def _answer(self, asked: Transcript) -> None:
        """Send the answer piece by piece, then whole, for clients that do not read pieces."""
        service = self._service
        try:
            async with service.runtime.stream(
                asked.text, adapter=service.adapter, max_tokens=service.max_tokens, deadline_s=service.deadline_s
            ) as stream:
                await self.write_event(HandledStart(context=asked.context).event())
                async for piece in stream:
                    await self.write_event(HandledChunk(text=piece).event())
                answer = stream.answer
            assert answer is not None
            await self.write_event(Handled(text=answer.text, context=asked.context).event())
            await self.write_event(HandledStop().event())
        except EdgetuneError as error:
            _LOG.warning("a transcript was not answered: %s", error)
            await self.write_event(NotHandled(text=str(error), context=asked.context).event())


async def _read_exactly(read: Callable[[int], Awaitable[bytes]], count: int) -> bytes:
    if count > MOST_BYTES:
        raise ValueError(f"an event of {count} bytes is longer than {MOST_BYTES}")
    return await read(count)
