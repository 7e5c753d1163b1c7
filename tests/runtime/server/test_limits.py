from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from edgetune_runtime.server.settings import ServerLimits
from runtime.server.conftest import Running, Start
from waiting import wait_for

PROMPT = "turn on the light"
LONG = {"context_length": 512, "contexts": 1}
"""Opens the bundle so that an answer of `streaming` takes seconds."""


def body(**more: object) -> dict[str, object]:
    return {"model": "command", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, **more}


def post(server: Running, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(**more), timeout=60)


@contextmanager
def streaming(server: Running, **more: object) -> Iterator[Iterator[str]]:
    """Streamed answers, long ones, whose first line has arrived."""
    sent = body(stream=True, max_tokens=490, **{"n": 8, **more})
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=sent, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def wait_until_another_waits(server: Running) -> None:
    wait_for(lambda: "edgetune_requests_waiting 1.0" in server.client.get("/metrics").text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b"[]", "the body is a JSON list"),
        (b"null", "the body is a JSON null"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"model": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"model": 5, "messages": [{"role": "user"}]}', "model is 5; give a string"),
        (b"{}", "messages is missing"),
    ],
)
def test_a_malformed_request_body_is_refused_in_one_line(data: bytes, message: str, server: Running) -> None:
    response = server.client.post("/v1/chat/completions", content=data)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]
    assert post(server).status_code == 200


def test_half_a_surrogate_pair_is_refused(server: Running) -> None:
    data = json.dumps(body(messages=[{"role": "user", "content": "\ud800 play"}]))
    assert server.client.post("/v1/chat/completions", content=data).status_code == 400
    assert post(server).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_huge_body_is_refused(is_chunked: bool, start: Start) -> None:
    server = start(limits=ServerLimits(body_bytes=1000))
    data = json.dumps(body(user="x" * 2000)).encode()
    response = server.client.post("/v1/chat/completions", content=iter([data]) if is_chunked else data)
    assert response.status_code == 413
    assert "1000 bytes" in response.json()["error"]["message"]
    assert post(server).status_code == 200


def test_unknown_paths_and_methods_are_refused_in_the_shape_of_the_api(server: Running) -> None:
    assert server.client.get("/v1/files").json()["error"]["type"] == "not_found_error"
    assert server.client.post("/api/create", json={}).json() == {
        "error": "no route /api/create; see the API's documentation"
    }
    wrong = server.client.get("/api/chat")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"] == "GET /api/chat is not possible; use POST"
    for path in ("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/../../etc/passwd", "/v1/models/..%5c..%5cx"):
        assert server.client.get(path).status_code == 404
    counted = server.client.get("/metrics").text
    assert 'route="other",status="404"' in counted
    assert "passwd" not in counted


def test_an_answer_has_no_more_tokens_than_the_server_allows(start: Start) -> None:
    server = start(limits=ServerLimits(answer_tokens=5))
    for most in (None, 200, 3):
        usage = post(server, max_tokens=most).json()["usage"]
        assert usage["completion_tokens"] == min(most or 5, 5)


def test_a_request_beyond_the_limit_of_waiting_ones_gets_retry_after(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(waiting=1))
    # The client of the streamed answers leaves first, or the one that waits would wait for all their tokens.
    with ThreadPoolExecutor(1) as other, streaming(server):
        waits = other.submit(post, server)
        wait_until_another_waits(server)
        refused = post(server)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert "1 requests are already waiting" in refused.json()["error"]["message"]
    assert waits.result().status_code == 200


def test_an_answer_that_takes_too_long_ends_with_its_tokens_so_far(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(request_s=0.3))
    with streaming(server) as lines:
        text = "".join(lines)
    assert '"finish_reason":"length"' in text
    assert text.endswith("[DONE]")
    assert text.count('"content"') < 8 * 480


def test_a_request_that_waits_outlasts_the_answers_that_came_with_it(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(request_s=1.5))
    with streaming(server) as lines, ThreadPoolExecutor(1) as other:
        waits = other.submit(post, server)
        text = "".join(lines)
    assert '"finish_reason":"length"' in text
    # Both ends were within milliseconds of each other, and the one that waited has time for a token.
    assert waits.result().status_code == 200
    assert waits.result().json()["usage"]["completion_tokens"] > 0


def test_stopping_lets_running_answers_finish_and_refuses_those_that_wait_or_arrive(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(grace_s=30))
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=490).text
    with streaming(server, n=2) as lines, ThreadPoolExecutor(1) as other:
        waits = other.submit(post, server)
        wait_until_another_waits(server)
        server.client.close()
        server.stop()
        for refused in (waits.result(), post(server)):
            assert refused.status_code == 503
            assert "the server is stopping" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.url}/readyz").json() == {"status": "stopping"}
        events = [json.loads(line.removeprefix("data: ")) for line in lines if not line.endswith("[DONE]")]
    choices = [event["choices"][0] for event in events]
    assert "".join(each["delta"].get("content", "") for each in choices if each["index"]) == expected
    assert choices[-1]["finish_reason"] == "length"
    server.thread.join(10)
    assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        post(server)


@pytest.mark.parametrize("stops", [1, 2])
def test_answers_that_are_not_finished_within_the_grace_time_end_with_an_error(stops: int, start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(grace_s=0.2 if stops == 1 else 60))
    with streaming(server) as lines:
        for _ in range(stops):
            server.stop()
            time.sleep(0.05)
        last = list(lines)[-1]
    assert "the server is stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_a_client_that_stops_reading_is_dropped_and_its_context_is_freed(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(client_s=0.3), send_buffer=8192)
    data = json.dumps(body(stream=True, max_tokens=490, n=8)).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        assert client.recv(12) == b"HTTP/1.1 200"
        assert not server.is_idle
        wait_for(lambda: server.is_idle)
        assert post(server).status_code == 200
        received = b"".join(iter(lambda: client.recv(65536), b""))
        assert b"[DONE]" not in received
    assert 'route="/v1/chat/completions",status="499"' in server.client.get("/metrics").text


def test_a_client_that_does_not_send_its_request_is_dropped(start: Start) -> None:
    server = start(limits=ServerLimits(client_s=0.3))
    for part in (b"", b"POST /v1/chat/comple", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(part)
            begin = time.monotonic()
            try:
                while client.recv(65536):
                    pass
            except ConnectionResetError:
                pass
            # uvicorn itself closes a connection 5 s after a response.
            assert time.monotonic() - begin < 8


def test_a_body_that_does_not_arrive_is_given_up(start: Start) -> None:
    server = start(limits=ServerLimits(client_s=0.3))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(65536).startswith(b"HTTP/1.1 408")
    assert post(server).status_code == 200


def test_many_at_once_all_get_the_answers_that_each_gets_alone(start: Start) -> None:
    server = start(contexts=2)
    models = ("home", "command", "tone", "command:0.7+tone:0.3")
    alone = {
        model: post(server, model=model, max_tokens=6).json()["choices"][0]["message"]["content"] for model in models
    }

    def answer(number: int) -> tuple[str, str]:
        model = models[number % 4]
        if number % 2:
            return model, post(server, model=model, max_tokens=6).json()["choices"][0]["message"]["content"]
        sent = body(model=model, max_tokens=6, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=sent, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
        return model, "".join(pieces)

    with ThreadPoolExecutor(16) as threads:
        for model, text in threads.map(answer, range(48)):
            assert text == alone[model]


def test_a_bundle_that_is_replaced_while_it_is_served_does_no_harm(home: Path, start: Start) -> None:
    server = start(home)
    before = post(server).json()["choices"]
    for file in home.rglob("*.gguf"):
        file.unlink()
        file.write_bytes(b"not a model")
    assert post(server).json()["choices"] == before
    # A merged model is opened when it is first used.
    response = post(server, model="whole")
    assert response.status_code == 500
    assert "the manifest says" in response.json()["error"]["message"]
    assert post(server, model="home").status_code == 200
