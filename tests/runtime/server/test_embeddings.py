"""Limits of requests for embeddings."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from edgetune_runtime import AsyncRuntime, Runtime
from edgetune_runtime.server.answer_request import ARRIVED
from edgetune_runtime.server.answering import Answering, Serving
from edgetune_runtime.server.settings import Access, ServerLimits
from runtime.server.conftest import Running, Start

MOST = 2048
LONG = "turn on the light in the hall " * 4


def post(server: Running, path: str, texts: list[str]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "home", "input": texts}, timeout=60)


def message(response: httpx.Response) -> str:
    error: Any = response.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def test_more_texts_than_openai_allows_are_refused(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle)
    for path in ("/v1/embeddings", "/api/embed"):
        refused = post(server, path, ["play"] * (MOST + 1))
        assert refused.status_code == 400
        assert "input has 2049 texts; send at most 2048 per request" in message(refused)
    assert post(server, "/v1/embeddings", ["play"] * MOST).status_code == 200


def test_texts_that_take_longer_than_a_request_may_are_refused(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle, limits=ServerLimits(request_s=0.05))
    refused = post(server, "/v1/embeddings", [LONG] * MOST)
    assert refused.status_code == 413
    assert "of 2048 texts were embedded within 0.05 s; send fewer texts per request" in message(refused)
    assert refused.json()["error"]["param"] == "input"
    assert "retry-after" not in refused.headers
    assert post(server, "/v1/embeddings", ["play"]).status_code == 200


def test_the_time_of_a_request_begins_with_its_arrival_and_has_a_quarter_more_if_it_waits(encoder_bundle: Path) -> None:
    limits, waits = ServerLimits(request_s=120), list[float]()

    async def embed(runtime: Runtime) -> None:
        answering = Answering(AsyncRuntime(runtime), Serving(Access(), limits, False, [], None))
        place = answering.queue.place

        def counting(limit_s: float, client: str) -> AbstractAsyncContextManager[None]:
            waits.append(limit_s)
            return place(limit_s, client)

        answering.queue.place = counting  # type: ignore[method-assign, assignment]
        for passed_s in (100, 130):
            ARRIVED.set(time.monotonic() - passed_s)
            assert len((await answering.embeddings(["play"]))[0]) == 1

    with Runtime.open(encoder_bundle) as runtime:
        asyncio.run(embed(runtime))
    assert waits == [pytest.approx(20 + 30, abs=15), pytest.approx(30, abs=1)]


def test_texts_that_are_not_embedded_when_the_server_ends_get_an_error(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle, limits=ServerLimits(grace_s=60))
    with ThreadPoolExecutor(1) as other:
        waits = other.submit(post, server, "/v1/embeddings", [LONG] * MOST)
        while "edgetune_requests_running 1.0" not in server.client.get("/metrics").text:
            assert not waits.done()
            time.sleep(0.002)
        # The second stop does not wait for running requests.
        server.stop()
        server.stop()
        response = waits.result()
    assert response.status_code == 503
    assert "the server is stopping" in message(response)
    server.thread.join(10)
    assert not server.thread.is_alive()
