"""Serves a bundle over HTTP until the process is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.inference.following import reload_signal
from edgetune_runtime.inference.runtime import Runtime

from .accepting import BACKLOG
from .answering import Answering, Serving
from .application import application
from .protocol import protocol

_EXTRA_S = 5
"""Seconds after the last answer to send its end to the clients."""
_MAX_LOGGING_S = 10
"""Seconds after that to log answers, whose redaction may take 5 s."""
_POLL_S = 0.02


def serve(
    runtime: Runtime, listening: socket.socket, serving: Serving, ready: Callable[[Callable[[], None]], None]
) -> None:
    """Answer requests on a socket until SIGTERM or SIGINT, then close the socket. The runtime stays open.

    `ready` is called once requests are answered, with a function that stops the server from any thread.
    """
    asyncio.run(_serve(AsyncRuntime(runtime), listening, serving, ready))


async def _serve(
    runtime: AsyncRuntime, listening: socket.socket, serving: Serving, ready: Callable[[Callable[[], None]], None]
) -> None:
    answering = Answering(runtime, serving)
    server = Server(application(answering), answering, lambda: ready(server.stop))
    warming: Awaitable[None] = asyncio.ensure_future(answering.warm()) if serving.warms else asyncio.sleep(0)
    watching = asyncio.ensure_future(answering.bundle.watch(answering.reload))
    await server.serve(sockets=[listening])
    watching.cancel()
    answering.good_answers.end()
    await answering.log_threads.ended(_MAX_LOGGING_S)
    await warming


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or SIGINT, or until `stop` is called from any thread.

    `ready` is called when it accepts requests. When it begins to stop, it still accepts requests, which `answering`
    refuses from then on, until none is answered or the grace time is over, which ends the answers that still run. The
    bundle is reloaded at each `reload_signal`.
    """

    def __init__(self, app: ASGIApp, answering: Answering, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(answering.limits),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=_EXTRA_S,
        )
        super().__init__(config)
        self._answering, self._ready = answering, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._ready()

    def stop(self) -> None:
        """Stop: running answers have the grace time, all others are refused. A second call does not wait for them."""
        self._call(self._stop)

    def _call(self, function: Callable[[], None]) -> None:
        """Call a function in the event loop, from any thread."""
        if self._loop is not None:
            # The loop is closed once the server has stopped.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function)

    def _stop(self) -> None:
        if self._draining is not None:
            self._answering.end()
            return
        self._answering.queue.stop()
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._answering.limits.grace_s):
                while self._answering.queue.running:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self._answering.end()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and SIGINT, as uvicorn does, but without raising them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, lambda *_: self.stop()) for each in (signal.SIGTERM, signal.SIGINT)}
        if hangup := reload_signal():
            before[hangup] = signal.signal(hangup, lambda *_: self._call(self._answering.bundle.ask))
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
