"""Connections: idle ones make room, no address takes all, and health is answered whatever others do."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest
from edgetune_runtime.server.accepting import connections_within_files
from edgetune_runtime.server.binding import bind
from edgetune_runtime.server.connections import ClientConnection, Connections
from edgetune_runtime.server.settings import Access, ServerLimits
from runtime.server.conftest import Running, Start
from runtime.server.test_limits import LONG, body, post, streaming
from waiting import wait_for

HERE, ALICE, BOB = "127.0.0.1", "192.168.1.5", "192.168.1.6"


class Opened:
    """Connections that are opened one after another, and the numbers of those that were closed."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self.connections = Connections(most, most_per_address)
        self.closed: list[int] = []
        self._count = 0

    def open(self, address: str) -> ClientConnection | None:
        number = self._count
        self._count += 1
        return self.connections.admit(address, lambda: self.closed.append(number))


def test_the_connection_that_waited_longest_makes_room() -> None:
    opened = Opened(3, 3)
    first, second, _ = (opened.open(ALICE) for _ in range(3))
    assert first is not None
    assert second is not None
    opened.connections.answer(first)
    opened.connections.wait(first)
    # Still waiting is no reason to stay longer.
    opened.connections.wait(second)
    opened.open(ALICE)
    opened.open(ALICE)
    assert opened.closed == [1, 2]


def test_connections_that_are_answered_stay_and_the_next_one_is_refused() -> None:
    opened = Opened(2, 2)
    connections = [opened.open(ALICE), opened.open(ALICE)]
    for connection in connections:
        assert connection is not None
        opened.connections.answer(connection)
    assert opened.open(BOB) is None
    assert connections[0] is not None
    opened.connections.leave(connections[0])
    assert opened.open(BOB) is not None
    assert opened.closed == []


def test_one_address_has_only_its_share_and_makes_room_for_itself() -> None:
    opened = Opened(4, 2)
    opened.open(BOB)
    for _ in range(5):
        assert opened.open(ALICE) is not None
    assert opened.closed == [1, 2, 3]


def test_the_client_with_most_connections_makes_room_for_others() -> None:
    opened = Opened(4, 3)
    opened.open(BOB)
    for _ in range(3):
        opened.open(ALICE)
    assert opened.open("192.168.1.7") is not None
    assert opened.closed == [1]


def test_addresses_of_one_ipv6_network_are_one_client_and_this_machine_has_no_share() -> None:
    opened = Opened(9, 1)
    opened.open("2001:db8::1")
    opened.open("2001:db8::ffff:1")
    opened.open("2001:db8:0:1::1")
    opened.open("fe80::1%eth0")
    assert opened.closed == [0]
    for address in (HERE, HERE, "::1", "127.0.0.2"):
        assert opened.open(address) is not None
    assert opened.closed == [0]


def test_of_this_machines_addresses_the_one_with_most_connections_makes_room() -> None:
    opened = Opened(4, 1)
    opened.open("127.0.0.2")
    for _ in range(6):
        assert opened.open(HERE) is not None
    assert 0 not in opened.closed


@contextmanager
def idle(server: Running, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection((HERE, server.port), timeout=5))
            with suppress(ConnectionError):
                client.sendall(sent)
            made.append(client)
        yield made


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


PAGES = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", PAGES], ids=["nothing", "half a head", "pipelined"])
def test_clients_that_keep_the_server_waiting_keep_nobody_out(sent: bytes, start: Start) -> None:
    server = start(limits=ServerLimits(connections=12), access=Access(keys=("k" * 20,)))
    with idle(server, 40, sent) as clients:
        begin = time.monotonic()
        response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {'k' * 20}"}, timeout=5)
        assert response.status_code == 200
        assert httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
        assert time.monotonic() - begin < 3
        if not sent:
            assert sum(map(is_closed, clients)) >= 40 - 12


def test_many_at_once_are_accepted_before_they_try_again(start: Start) -> None:
    server = start()
    begin = time.monotonic()
    with idle(server, 300):
        # The system drops what its queue has no room for, and the client tries again after 1 s, then 2 s.
        assert time.monotonic() - begin < 2


def test_a_client_that_stops_reading_makes_room(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(connections=1), send_buffer=8192)
    data = json.dumps(body(stream=True, max_tokens=490, n=8)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((HERE, server.port))
        client.sendall(head + data)
        wait_for(lambda: httpx.get(f"{server.url}/v1/models").status_code == 200, 10)


def test_a_body_that_arrives_slowly_makes_room(start: Start) -> None:
    server = start(limits=ServerLimits(connections=4))
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with idle(server, 8, head):
        assert post(server).status_code == 200


def test_active_connections_are_kept_and_health_checks_answered(start: Start) -> None:
    server = start(**LONG, limits=ServerLimits(connections=1))
    with streaming(server) as lines, idle(server, 30):
        assert httpx.get(f"{server.url}/healthz", timeout=5).json()["status"] == "ok"
        refused = httpx.get(f"{server.url}/v1/models", timeout=5)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert "all 1 connections are in use" in refused.json()["error"]["message"]
        assert next(lines).startswith("data: ")
    assert post(server).status_code == 200


def test_the_limit_of_open_files_is_raised_or_lowers_that_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert connections_within_files(256) == 256
    assert limits[-1] == (448, 4096)
    assert connections_within_files(100_000) == 4096 - 192
    limits.append((64, 64))
    assert connections_within_files(256) == 32


def test_without_free_file_descriptors_the_server_closes_the_connection_and_continues() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bind(HERE, 0) as listening, ExitStack() as stack:
        listening.setblocking(False)
        address = listening.getsockname()
        clients = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(2)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (listening.fileno() + 40, limits[1]))
        files: list[int] = []
        try:
            with suppress(OSError):
                while True:
                    files.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(BlockingIOError):
                listening.accept()
            assert clients[0].recv(1) == b""
        finally:
            for file in files:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        accepted, _ = listening.accept()
        with accepted:
            accepted.sendall(b"!")
            assert clients[1].recv(1) == b"!"


def test_a_server_without_free_files_answers_and_logs_little(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "edgetune_runtime", "serve", str(bundle), "--port", "0", "--json"]
    limited = ["sh", "-c", 'ulimit -n 90 && exec "$@"', "sh", *command]
    with log.open("wb") as errors, subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        try:
            with ExitStack() as stack:
                for _ in range(200):
                    with suppress(OSError):
                        stack.enter_context(socket.create_connection((HERE, int(url.rpartition(":")[2])), timeout=5))
                time.sleep(1)
                assert httpx.get(f"{url}/healthz", timeout=10).status_code == 200
            assert httpx.get(f"{url}/v1/models", timeout=10).status_code == 200
        finally:
            process.terminate()
    assert log.stat().st_size < 10_000


def test_a_short_body_may_come_after_its_request_was_refused(server: Running) -> None:
    head = f"POST /api/create HTTP/1.1\r\nHost: {HERE}\r\nContent-Length: 2\r\n\r\n".encode()
    with socket.create_connection((HERE, server.port), timeout=5) as client:
        for _ in range(3):
            client.sendall(head)
            reply = HTTPResponse(client)
            reply.begin()
            assert (reply.status, reply.read()[:9]) == (404, b'{"error":')
            client.sendall(b"{}")
