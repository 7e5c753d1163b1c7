"""Serve a bundle: open it, answer requests until the process is told to stop, close it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from edgetune_runtime.answer_log import AnswerLog
from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.inference.runtime import Runtime

from .answering import Answering
from .application import application
from .listening import Server
from .rewriting import Rewriter
from .settings import Access, ServerLimits


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. With `warms`, the states of all fixed prompts are computed first, and after a change.

    Each of `rewriters` is a model of its own. Answers are written to `log`.
    """

    access: Access = field(default_factory=Access)
    limits: ServerLimits = field(default_factory=ServerLimits)
    warms: bool = False
    rewriters: Sequence[Rewriter] = ()
    log: AnswerLog | None = None


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
    answering = Answering(runtime, serving.limits, serving.rewriters, serving.log, warms=serving.warms)
    server = Server(
        application(answering, serving.access),
        serving.limits,
        ready=lambda: ready(server.stop),
        reload=answering.reload,
        stopping=answering.stop,
        is_busy=lambda: answering.queue.running > 0,
        ending=answering.end,
    )
    warming: Awaitable[None] = asyncio.ensure_future(answering.warm()) if serving.warms else asyncio.sleep(0)
    watching = asyncio.ensure_future(answering.bundle.watch(answering.reload))
    await server.serve(sockets=[listening])
    watching.cancel()
    answering.good_answers.end()
    await warming
