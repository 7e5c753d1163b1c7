"""Requests that no client sends: each is refused in one line with a status of 4xx, and the next one is answered."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import suppress

import pytest
from edgetune_runtime.server.settings import Access, ServerLimits
from runtime.server.conftest import Running, Start

DIGITS = "1" * 400
PATHS = {
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "play"}], "max_tokens": 2',
    "/v1/completions": '"prompt": "play", "max_tokens": 2',
    "/v1/responses": '"input": "play", "max_output_tokens": 2',
    "/api/chat": '"stream": false, "messages": [{"role": "user", "content": "play"}]',
}


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def ask(server: Running, data: bytes, more: bytes = b"") -> bytes:
    """What the server sends for `data`, and then for `more`, until it closes the connection or is silent for 1 s."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as client, suppress(OSError):
        client.sendall(data)
        if more:
            with suppress(TimeoutError):
                received = client.recv(1 << 16)
            client.sendall(more)
        while part := client.recv(1 << 16):
            received += part
    return received


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (f'"temperature": {DIGITS}', "give a smaller number"),
        ('"temperature": 1e999', "give a smaller number"),
        ('"temperature": -1', "a number of at least 0"),
        (f'"top_k": {DIGITS}', "give a smaller number"),
        (f'"seed": {DIGITS}', "give a smaller number"),
        (f'"top_k": 1{"0" * 5000}', "thousands of digits"),
        ('"repeat_penalty": 1e-300', "from 0.01 to 100"),
        ('"repeat_penalty": 1e300', "from 0.01 to 100"),
        (f'"stop": {json.dumps([str(number) for number in range(65)])}', "up to 64 texts"),
        (f'"stop": "{"x" * 257}"', "1 to 256 characters"),
        ('"stop": ["\\ud800"]', "half a character"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_values_out_of_range_are_refused_by_name(path: str, member: str, message: str, server: Running) -> None:
    member = f'"options": {{{member}}}' if path == "/api/chat" else member
    response = server.client.post(path, content=f'{{"model": "command", {PATHS[path]}, {member}}}')
    assert response.status_code == 400
    assert message in response.text
    assert len(response.content) < 1000


@pytest.mark.parametrize("scale", ["1e38", "-1001", DIGITS])
def test_scales_that_would_overflow_are_refused(scale: str, server: Running) -> None:
    given = f'{{"model": "home", "adapters": {{"command": {scale}}}, "temperature": 1, {PATHS["/v1/completions"]}}}'
    named = f'{{"model": "command:{scale}", "temperature": 1, {PATHS["/v1/completions"]}}}'
    for data in (given, named):
        response = server.client.post("/v1/completions", content=data)
        assert response.status_code in (400, 404)
        assert len(response.content) < 1500


@pytest.mark.parametrize("value", ["1e-320", "1e-7", "1e308", "3"])
def test_every_temperature_above_0_gives_an_answer(value: str, server: Running) -> None:
    data = f'{{"model": "command", "temperature": {value}, "seed": 1, {PATHS["/v1/completions"]}}}'
    assert server.client.post("/v1/completions", content=data).status_code == 200


@pytest.mark.parametrize(
    "member",
    [
        b'"metadata": {"a": "\\ud800"}',
        b'"metadata": {"\\uDC00": "a"}',
        b'"instructions": "\\ud83d x"',
        b'"metadata": {"a": "\xed\xa0\x80"}',
        f'"metadata": {deep(128)}'.encode(),
        f'"metadata": {deep(900)}'.encode(),
        f'"text": {{"format": {{"type": "json_schema", "schema": {{"a": {deep(500)}}}}}}}'.encode(),
    ],
    ids=["half", "half in a name", "half in a text", "half in UTF-8", "129 levels", "901 levels", "a deep schema"],
)
def test_values_that_json_cannot_repeat_are_refused(member: bytes, server: Running) -> None:
    data = b'{"model": "command", "input": "play", "max_output_tokens": 2, %b}' % member
    response = server.client.post("/v1/responses", content=data)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_whole_characters_brackets_in_texts_and_nul_are_answered(server: Running) -> None:
    metadata = '{"smile": "\\ud83d\\ude00", "brackets": "' + '[{\\"' * 200 + '", "nul": "a\\u0000b"}'
    data = (
        f'{{"model": "command", "input": "play\\u0000 \\ud83d\\ude00", "max_output_tokens": 2, "metadata": {metadata}}}'
    )
    response = server.client.post("/v1/responses", content=data)
    assert response.status_code == 200
    assert response.json()["metadata"] == json.loads(metadata)


def test_errors_repeat_only_the_beginning_of_what_was_sent(server: Running) -> None:
    name = "x" * 100_000
    for response in (
        server.client.post("/v1/completions", json={"model": name, "prompt": "play"}),
        server.client.post("/v1/completions", json={"model": "home", "prompt": "play", "adapters": {name: "1"}}),
        server.client.get(f"/v1/models/{name[:10_000]}"),
        server.client.get(f"/{name[:10_000]}"),
    ):
        assert 400 <= response.status_code < 500
        assert len(response.content) < 3000
        assert "choose" in response.text or "give" in response.text or "see" in response.text


@pytest.mark.parametrize("host", ["[::1]evil.com", "[::1]:80@evil", "localhost:80@evil", "[localhost]", "[::1", "::1"])
def test_a_host_with_something_behind_it_is_refused(host: str, server: Running) -> None:
    assert server.client.get("/healthz", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["[::1]", "[::1]:8080", "localhost:", "[fe80::1%eth0]:80"])
def test_a_host_with_a_port_or_a_zone_is_one(host: str, server: Running) -> None:
    assert server.client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n", 421),
        (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n", 404),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n", 404),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 60_000, 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 100, 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 250_000 + b"\r\n", 400),
        (b"G\xc3\xa9T /healthz HTTP/1.1\r\nHost: localhost\r\n", 400),
    ],
)
def test_an_ambiguous_request_head_is_refused(head: bytes, status: int, server: Running) -> None:
    assert ask(server, head + b"\r\n").startswith(b"HTTP/1.1 %d " % status)
    assert server.client.get("/healthz").status_code == 200


def test_what_follows_a_request_of_uncertain_length_is_not_answered(server: Running) -> None:
    data = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = ask(server, data + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in received.lower()


def test_invalid_http_after_an_answer_closes_the_connection_without_a_traceback(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(access=Access(keys=("k" * 20,)))
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level(logging.WARNING):
        received = ask(server, head, b"ZZZZ\r\n")
    assert received.startswith(b"HTTP/1.1 401 ")
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_body_of_tiny_chunks_is_refused_with_and_without_a_key(start: Start) -> None:
    server = start(access=Access(keys=("k" * 20,)))
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n%b\r\n"
    for key, status in ((b"", 401), (b"Authorization: Bearer " + b"k" * 20 + b"\r\n", 400)):
        begin = time.monotonic()
        received = ask(server, head % key, b"1\r\n \r\n" * 100_000)
        assert b"HTTP/1.1 %d " % status in received
        assert time.monotonic() - begin < 5


def test_a_body_that_never_ends_after_an_answer_is_cut_off(start: Start) -> None:
    server = start(access=Access(keys=("k" * 20,)), limits=ServerLimits(client_s=0.5))
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(head)
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < begin + 5:
                client.sendall(b"x")
                time.sleep(0.05)


@pytest.mark.parametrize("name", ["h2c", "websocket"])
def test_a_request_to_upgrade_is_answered_without_it(
    name: str, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    reply = server.client.get("/healthz", headers={"Connection": "Upgrade", "Upgrade": name})
    assert reply.status_code == 200
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []
