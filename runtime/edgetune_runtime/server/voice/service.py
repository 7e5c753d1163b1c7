"""A Wyoming service that handles intents: answers transcripts with an adapter.

Protocol: https://github.com/OHF-Voice/wyoming. Home Assistant's Wyoming integration makes a conversation agent of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from wyoming.asr import Transcript
from wyoming.event import Event, async_read_event, async_write_event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop, NotHandled
from wyoming.info import Attribution, Describe, HandleModel, HandleProgram, Info
from wyoming.ping import Ping, Pong

from edgetune_runtime import __version__
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.inference.following import FollowedBundle, reload_signal
from edgetune_runtime.server.accepting import BACKLOG, connections_within_files
from edgetune_runtime.server.connections import Connections
from edgetune_runtime.server.settings import ServerLimits

_LOG = logging.getLogger(__name__)

MAX_BYTES = 1 << 16
"""Size of the largest event that is read: a transcript is short, and audio is not read."""


@dataclass(frozen=True)
class WyomingService:
    """What answers: a runtime, one of its adapters (None: the base), and limits per answer and of connections."""

    runtime: AsyncRuntime
    adapter: str | None
    languages: tuple[str, ...]
    max_tokens: int
    deadline_s: float
    limits: ServerLimits = field(default_factory=ServerLimits)

    def info(self) -> Info:
        """The description of the service for clients."""
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


def serve(service: WyomingService, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer clients on a socket until SIGTERM or SIGINT, then close the socket. The runtime stays open."""
    with suppress(asyncio.CancelledError):
        asyncio.run(run(service, listening, ready))


async def run(service: WyomingService, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer clients until the task is cancelled, and reload the bundle when `FollowedBundle` does or at a signal."""
    limits, tasks = service.limits, set[asyncio.Task[None]]()
    connections = Connections(connections_within_files(limits.connections), limits.connections_per_address)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task, peer = asyncio.current_task(), writer.get_extra_info("peername")
        assert task is not None
        abort = writer.transport.abort
        # A client that has gone already has no address.
        connection = connections.admit(peer[0], abort) if peer else None
        if connection is None:
            abort()
            return
        tasks.add(task)
        client = Client(service, reader, writer)
        try:
            async for event in client.events():
                connections.answer(connection)
                await client.answer(event)
                connections.wait(connection)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # The client left, is too slow, or sent no valid event, as the library does not check the fields of one.
            _LOG.info("a connection ended: %s", error)
        except asyncio.CancelledError:
            # Before 3.12, asyncio logs a traceback for a connection whose task was cancelled.
            return
        finally:
            connections.wait(connection)
            writer.close()
            with suppress(OSError):
                async with asyncio.timeout(limits.client_s):
                    await writer.wait_closed()
            abort()
            connections.leave(connection)
            tasks.discard(task)

    bundle = FollowedBundle(service.runtime)
    server = await asyncio.start_server(connected, sock=listening, limit=MAX_BYTES, backlog=BACKLOG)
    serving = asyncio.current_task()
    assert serving is not None
    # Not on Windows, and not outside the main thread.
    with suppress(NotImplementedError, RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        if hangup := reload_signal():
            asyncio.get_running_loop().add_signal_handler(hangup, bundle.ask)
    watching = asyncio.create_task(bundle.watch(bundle.reload))
    try:
        ready()
        await server.serve_forever()
    finally:
        server.close()
        for task in (watching, *tasks):
            task.cancel()


class Client:
    """One client."""

    def __init__(self, service: WyomingService, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The library reads as many bytes as an event announces.
        reader.readexactly = partial(_read_exactly, reader.readexactly)  # type: ignore[method-assign]
        self._service, self._reader, self._writer = service, reader, writer

    async def events(self) -> AsyncIterator[Event]:
        """What the client sends; TimeoutError if the first event does not arrive in time."""
        limit_s: float | None = self._service.limits.client_s
        while True:
            async with asyncio.timeout(limit_s):
                event = await async_read_event(self._reader)
            if event is None:
                return
            yield event
            limit_s = None

    async def answer(self, event: Event) -> None:
        """Answer a transcript, a question about the service, or a ping; ignore other events.

        TimeoutError if the client does not read the answer.
        """
        if Transcript.is_type(event.type):
            await self._answer(Transcript.from_event(event))
        elif Describe.is_type(event.type):
            await self._send(self._service.info().event())
        elif Ping.is_type(event.type):
            await self._send(Pong(text=Ping.from_event(event).text).event())

    async def _answer(self, transcript: Transcript) -> None:
        """Send the answer piece by piece, then whole, for clients that do not read pieces."""
        if not isinstance(transcript.text, str):
            raise TypeError(f"the text of a transcript is of type {type(transcript.text).__name__}")
        service = self._service
        try:
            async with service.runtime.stream(
                transcript.text, adapter=service.adapter, max_tokens=service.max_tokens, deadline_s=service.deadline_s
            ) as stream:
                await self._send(HandledStart(context=transcript.context).event())
                async for piece in stream:
                    await self._send(HandledChunk(text=piece).event())
                answer = stream.answer
            assert answer is not None
            await self._send(Handled(text=answer.text, context=transcript.context).event())
            await self._send(HandledStop().event())
        except EdgetuneError as error:
            _LOG.warning("a transcript was not answered: %s", error)
            await self._send(NotHandled(text=str(error), context=transcript.context).event())

    async def _send(self, event: Event) -> None:
        async with asyncio.timeout(self._service.limits.client_s):
            await async_write_event(event, self._writer)


async def _read_exactly(read: Callable[[int], Awaitable[bytes]], count: int) -> bytes:
    if count > MAX_BYTES:
        raise ValueError(f"an event of {count} bytes is longer than {MAX_BYTES}")
    return await read(count)
