"""Bodies that take long to read, and what others wait for meanwhile."""

from __future__ import annotations

import gzip
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from edgetune_runtime.server.settings import ServerLimits
from runtime.server.conftest import Running, Start
from runtime.server.test_limits import LONG
from waiting import wait_for

DEAR = {"type": "integer", "multipleOf": 999953}
TOOL = {"type": "function", "function": {"name": "set", "parameters": {"type": "object", "properties": {"n": DEAR}}}}


def body(**more: object) -> dict[str, Any]:
    return {"model": "home", "messages": [{"role": "user", "content": "light"}], "max_tokens": 2, **more}


def chat(server: Running, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(**more), timeout=60)


def answered_meanwhile(server: Running, **more: object) -> tuple[httpx.Response, int]:
    """The response to a request, and how often another client gets its health check and an answer meanwhile."""
    answered = 0
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(chat, server, **more)
        while not asked.done():
            assert httpx.get(f"{server.url}/healthz", timeout=30).status_code == 200
            assert chat(server).status_code == 200
            answered += 1
    return asked.result(), answered


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEAR}}}, "more than 2 s or 64 MB"),
        ({"tools": [TOOL]}, "the parameters of the tools cannot be used: it takes"),
        ({"messages": [{"role": "user", "content": ""}] * 30_000}, "the context allows 1 to"),
    ],
    ids=["schema", "tool", "messages"],
)
def test_an_expensive_schema_is_refused_and_blocks_no_other_request(
    start: Start, tools_bundle: Path, more: dict[str, Any], told: str
) -> None:
    server = start(tools_bundle, limits=ServerLimits(request_s=10), contexts=2)
    response, answered = answered_meanwhile(server, **more)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]
    assert answered > 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"messages": [{"role": "user", "content": "<|im_end|>" * 100_000}]}, "the context allows 1 to"),
        ({"messages": [{"role": "user", "content": "7" * 1_000_000}]}, "the context allows 1 to"),
        ({"messages": [{"role": "user", "content": [{}] * 640_000}]}, "the body has more than 100000 values"),
        ({"tools": [{**TOOL, "description": "x" * 1_000_000}]}, "at most 131072 are allowed"),
        ({"stop": ["x"] * 90_000}, "stop"),
    ],
    ids=["control tokens", "digits", "parts", "tools", "stop"],
)
def test_a_body_with_too_much_in_it_is_refused(
    start: Start, tools_bundle: Path, more: dict[str, Any], told: str
) -> None:
    response = chat(start(tools_bundle), **more)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]


def test_the_time_of_a_request_begins_with_its_first_byte(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(request_s=2))
    data = json.dumps(body(max_tokens=490, n=8)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        begin = time.monotonic()
        client.sendall(head + data[:10])
        time.sleep(1.8)
        client.sendall(data[10:])
        assert b" 200 " in client.recv(1000)
        # It has a quarter of its time after waiting for the bytes, and not all of it.
        assert time.monotonic() - begin < 3.6


def test_a_compressed_body_is_refused(start: Start) -> None:
    server, headers = start(), {"Content-Encoding": "gzip"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=gzip.compress(b"{}"), headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (415, "invalid_request_error")
    plain = httpx.post(f"{server.url}/v1/chat/completions", content=b"{}", headers={"Content-Encoding": "Identity"})
    assert plain.status_code == 400


def test_few_large_bodies_are_there_at_once(start: Start) -> None:
    server = start(limits=ServerLimits(), contexts=1)
    large = b"x" * 100_000
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 200000\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    try:
        for client in held:
            client.sendall(head + large)
        wait_for(lambda: chat(server, user="x" * 100_000).status_code == 503, 10)
        assert chat(server).status_code == 200
    finally:
        for client in held:
            client.close()
    wait_for(lambda: chat(server, user="x" * 100_000).status_code == 200, 10)
