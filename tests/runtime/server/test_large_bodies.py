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

DEAR = {"type": "integer", "multipleOf": 999953}
TOOL = {"type": "function", "function": {"name": "set", "parameters": {"type": "object", "properties": {"n": DEAR}}}}


def body(**more: object) -> dict[str, Any]:
    return {"model": "home", "messages": [{"role": "user", "content": "light"}], "max_tokens": 2, **more}


def chat(server: Running, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(**more), timeout=60)


def other_waits_s(server: Running, **more: object) -> tuple[httpx.Response, float]:
    """The response to a request, and the longest that another client waits for an answer or its health check."""
    longest = 0.0
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(chat, server, **more)
        while not asked.done():
            begin = time.monotonic()
            assert httpx.get(f"{server.url}/healthz", timeout=30).status_code == 200
            assert chat(server).status_code == 200
            longest = max(longest, time.monotonic() - begin)
    return asked.result(), longest


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEAR}}}, "more than 2 s or 64 MB"),
        ({"tools": [TOOL]}, "the parameters of the tools cannot be used: it takes"),
        ({"messages": [{"role": "user", "content": "<|im_end|>" * 100_000}]}, "the context allows 1 to"),
        ({"messages": [{"role": "user", "content": "7" * 1_000_000}]}, "the context allows 1 to"),
        ({"messages": [{"role": "user", "content": [{}] * 640_000}]}, "the body has more than 100000 values"),
        ({"messages": [{"role": "user", "content": ""}] * 30_000}, "the context allows 1 to"),
        ({"tools": [{**TOOL, "description": "x" * 1_000_000}]}, "at most 131072 are allowed"),
        ({"stop": ["x"] * 90_000}, "stop"),
    ],
    ids=["schema", "tool", "control tokens", "digits", "parts", "messages", "tools", "stop"],
)
def test_an_expensive_schema_is_refused_and_blocks_no_other_request(
    start: Start, tools_bundle: Path, more: dict[str, Any], told: str
) -> None:
    server = start(tools_bundle, limits=ServerLimits(request_s=10), contexts=2)
    response, waited_s = other_waits_s(server, **more)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]
    assert waited_s < 5


def test_the_time_of_a_request_begins_with_its_first_byte(start: Start) -> None:
    server = start(limits=ServerLimits(request_s=1), contexts=1)
    data = json.dumps(body(max_tokens=200)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        begin = time.monotonic()
        client.sendall(head + data[:10])
        time.sleep(0.9)
        client.sendall(data[10:])
        assert b" 200 " in client.recv(1000)
        assert time.monotonic() - begin < 3


def test_a_compressed_body_is_refused(start: Start) -> None:
    headers = {"Content-Encoding": "gzip"}
    response = httpx.post(f"{start().url}/v1/chat/completions", content=gzip.compress(b"{}"), headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (415, "invalid_request_error")


def test_few_large_bodies_are_there_at_once(start: Start) -> None:
    server = start(limits=ServerLimits(), contexts=1)
    large = b"x" * 100_000
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 200000\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    try:
        for client in held:
            client.sendall(head + large)
        time.sleep(0.5)
        assert chat(server, user="x" * 100_000).status_code == 503
        assert chat(server).status_code == 200
    finally:
        for client in held:
            client.close()
    begin = time.monotonic()
    while chat(server, user="x" * 100_000).status_code != 200:
        assert time.monotonic() < begin + 10
