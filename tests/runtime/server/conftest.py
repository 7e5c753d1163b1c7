"""A server on loopback in a thread, around a tiny real bundle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.answer_log.log import AnswerLog
from edgetune_runtime.inference import following
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.server.answering import Serving
from edgetune_runtime.server.binding import bind, url_of
from edgetune_runtime.server.listening import serve
from edgetune_runtime.server.rewriting import Rewriter
from edgetune_runtime.server.settings import Access, ServerLimits
from openai import OpenAI


@dataclass
class Running:
    """A running server, its runtime, and a client without an API of its own."""

    url: str
    runtime: Runtime
    stop: Callable[[], None]
    thread: threading.Thread
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        # uvicorn closes a connection that is idle for 5 s; a request sent at that moment would fail.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=limits)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def is_idle(self) -> bool:
        """Whether no call holds a context."""
        return all(context.holder is None for context in loaded_bundle(self.runtime).pool(None)[0].contexts)


Start = Callable[..., Running]


@contextmanager
def started(
    bundle: Path,
    *,
    access: Access = Access(),  # noqa: B008 - it is frozen
    limits: ServerLimits = ServerLimits(grace_s=5),  # noqa: B008 - as above
    warms: bool = False,
    rewriters: Sequence[Rewriter] = (),
    send_buffer: int | None = None,
    log: Path | None = None,
    redact: Sequence[str] = (),
    **opening: object,
) -> Iterator[Running]:
    """A server for a bundle, until the block ends; `opening`: of `Runtime.open`, with two contexts and no disk."""
    is_ready = threading.Event()
    stops: list[Callable[[], None]] = []

    def ready(stop: Callable[[], None]) -> None:
        stops.append(stop)
        is_ready.set()

    opening = {"contexts": 2, "disk_mb": 0, **opening}
    with Runtime.open(bundle, **opening) as runtime, bind("127.0.0.1", 0) as listening:
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        answers = None if log is None else AnswerLog(log, runtime.manifest, redact=redact)
        arguments = (runtime, listening, Serving(access, limits, warms, rewriters, answers), ready)
        thread = threading.Thread(target=serve, args=arguments)
        url = url_of(listening)
        thread.start()
        assert is_ready.wait(30)
        running = Running(url, runtime, stops[0], thread)
        try:
            with running.client:
                yield running
        finally:
            running.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def start(bundle: Path) -> Iterator[Start]:
    """`start(bundle, access=, limits=, …)` starts a server as `started` does."""
    with ExitStack() as stack:
        yield lambda folder=bundle, **options: stack.enter_context(started(folder, **options))


@pytest.fixture
def fewer(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle without `tone`, to switch to: servers look for another version every 20 ms."""
    monkeypatch.setattr(following, "_WATCH_S", 0.02)
    remove_from_bundle(home, "tone")
    return home


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    """A server with default settings for the bundle of the LLaMA base, which the tests of a module share."""
    with started(bundle) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    """A client of the server's OpenAI API."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client
