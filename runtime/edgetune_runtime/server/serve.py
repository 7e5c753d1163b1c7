"""Serve a bundle: open it, answer requests until the process is told to stop, close it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.inference.runtime import Runtime

from .answering import Answering, Serving
from .application import application
from .listening import Server


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
    await warming
