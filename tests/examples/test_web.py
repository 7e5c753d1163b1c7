"""The web apps over real HTTP: they stream, refuse with a status, and free the context of a client that left."""

from __future__ import annotations

import asyncio
import os
import queue
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from edgetune_runtime import AsyncRuntime, Runtime
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.context import Context
from examples.conftest import EXAMPLES
from waiting import wait_for
from werkzeug.serving import make_server

PROMPT = "turn on the light"
WAIT_S = 30


@contextmanager
def flask_at(bundle: Path) -> Iterator[tuple[str, Runtime]]:
    """The Flask app's address and its runtime, which has one context and lets nobody wait."""
    create_app = runpy.run_path(str(EXAMPLES / "web/flask_app.py"))["create_app"]
    with Runtime.open(bundle, contexts=1, max_waiting=0, disk_mb=0) as runtime:
        server = make_server("127.0.0.1", 0, create_app(runtime), threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}", runtime
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@contextmanager
def starlette_at(bundle: Path) -> Iterator[tuple[str, Runtime]]:
    """The same of the Starlette app, served by uvicorn in an event loop of its own."""
    create_app = runpy.run_path(str(EXAMPLES / "web/starlette_app.py"))["create_app"]
    ready: queue.Queue[tuple[uvicorn.Server, Runtime]] = queue.Queue()

    async def serve(listening: socket.socket) -> None:
        async with await AsyncRuntime.open(bundle, contexts=1, max_waiting=0, disk_mb=0) as runtime:
            server = uvicorn.Server(uvicorn.Config(create_app(runtime), log_level="error"))
            ready.put((server, runtime.runtime))
            await server.serve(sockets=[listening])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        server, runtime = ready.get(timeout=WAIT_S)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", runtime
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(params=[flask_at, starlette_at])
def served(request: pytest.FixtureRequest, talking_bundle: Path) -> Iterator[tuple[str, Runtime]]:
    """Address and runtime of each app."""
    with request.param(talking_bundle) as opened:
        yield opened


def context_of(runtime: Runtime) -> Context:
    """The only context, which a call must have used."""
    (context,) = loaded_bundle(runtime).pool(None)[0].contexts
    return context


def test_an_answer_arrives_in_pieces(served: tuple[str, Runtime]) -> None:
    url, runtime = served
    expected = runtime.generate(PROMPT, adapter="reply", max_tokens=200)
    assert expected.stop_reason == "length"
    with httpx.stream("POST", f"{url}/reply", content=PROMPT) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        pieces = list(response.iter_text())
    assert len(pieces) > 10
    assert "".join(pieces) == expected.text


def test_a_client_that_leaves_frees_the_context_before_the_answer_ends(served: tuple[str, Runtime]) -> None:
    url, runtime = served
    prompt_tokens = runtime.generate(PROMPT, adapter="reply", max_tokens=1).timings.prompt_tokens
    with httpx.stream("POST", f"{url}/reply", content=PROMPT) as response:
        next(response.iter_raw())
    context = context_of(runtime)
    wait_for(lambda: context.holder is None)
    assert len(context.tokens) < prompt_tokens + 200
    assert httpx.post(f"{url}/reply", content=PROMPT).status_code == 200


def test_a_call_that_cannot_wait_gets_503_and_the_next_one_an_answer(served: tuple[str, Runtime]) -> None:
    url, runtime = served
    with closing(runtime.stream(PROMPT, adapter="reply")) as held:
        next(held)
        refused = httpx.post(f"{url}/reply", content=PROMPT)
    assert refused.status_code == 503
    assert refused.text.count("\n") == 1
    assert httpx.post(f"{url}/reply", content=PROMPT).status_code == 200


@pytest.mark.parametrize(
    ("adapter", "prompt", "status"),
    [("nobody", PROMPT, 404), ("reply", "lamp " * 1000, 400), ("reply", "x" * 200_000, 413)],
)
def test_an_invalid_request_gets_an_http_status(
    served: tuple[str, Runtime], adapter: str, prompt: str, status: int
) -> None:
    url, _ = served
    assert httpx.post(f"{url}/{adapter}", content=prompt).status_code == status
    assert httpx.post(f"{url}/reply", content=PROMPT).status_code == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="gunicorn needs fork")
def test_gunicorns_workers_each_open_the_bundle_and_answer_alike(talking_bundle: Path) -> None:
    with Runtime.open(talking_bundle, disk_mb=0) as runtime:
        name = runtime.adapters[0]
        expected = runtime.generate(PROMPT, adapter=name, max_tokens=200).text
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--threads", "2", "--log-level", "error"]
        command += ["--bind", f"fd://{listening.fileno()}", "--pythonpath", str(EXAMPLES / "web")]
        app = f"flask_app:open_app({str(talking_bundle)!r})"
        with subprocess.Popen([*command, app], pass_fds=[listening.fileno()]) as gunicorn:
            try:
                answers = [httpx.post(f"{address}/{name}", content=PROMPT, timeout=WAIT_S).text for _ in range(6)]
                assert answers == [expected] * 6
                assert httpx.post(f"{address}/nobody", content=PROMPT, timeout=WAIT_S).status_code == 404
            finally:
                gunicorn.terminate()
