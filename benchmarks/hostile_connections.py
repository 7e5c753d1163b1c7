"""Attacks by connections: idle ones, slow and half requests, and headers that two readers may read differently."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from benchmarks.hostile_attack import WRONG, Attack, Replies
from benchmarks.hostile_server import Reply, Target, chat_body

_IDLE = 300
_HOLD_S = 8.0
"""How long connections are held: longer than the server's limit for a client that sends nothing."""


def _head(target: Target, *headers: str, path: str = "/v1/chat/completions", host: str = "") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{target.port}'}", *headers, "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode()


def _body(target: Target) -> bytes:
    return json.dumps(chat_body(target.names.base, "hi")).encode()


def _idle(target: Target, data: bytes) -> Replies:
    """Open connections, send a few bytes on each, and hold them."""
    begin = time.monotonic()
    refused = 0
    with ExitStack() as opened:
        for _ in range(_IDLE):
            try:
                connection = opened.enter_context(socket.create_connection(("127.0.0.1", target.port), timeout=2))
                connection.sendall(data)
            except OSError:
                refused += 1
        time.sleep(_HOLD_S)
    return [Reply(f"{refused} of {_IDLE} refused", b"", time.monotonic() - begin)]


def _slow(target: Target) -> Replies:
    """20 bodies that arrive byte by byte."""
    begin = time.monotonic()
    data = _body(target)
    head = _head(target, "Content-Type: application/json", f"Content-Length: {len(data)}")
    with ExitStack() as opened:
        connections = [opened.enter_context(target.connect()) for _ in range(20)]
        for place in range(16):
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(head if place == 0 else data[place : place + 1])
            time.sleep(0.5)
    return [Reply("sent slowly", b"", time.monotonic() - begin)]


def _unread(target: Target) -> Replies:
    """20 clients that do not read their streams."""
    begin = time.monotonic()
    data = json.dumps({**chat_body(target.names.base, "tell a story"), "max_tokens": 1000, "stream": True}).encode()
    head = _head(target, "Content-Type: application/json", f"Content-Length: {len(data)}")
    with ExitStack() as opened:
        for _ in range(20):
            connection = opened.enter_context(socket.socket())
            # The window is agreed on with the connection.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", target.port))
            connection.sendall(head + data)
        time.sleep(_HOLD_S)
    return [Reply("not read", b"", time.monotonic() - begin)]


def _both_lengths(target: Target) -> Replies:
    """A length and chunks: a proxy that reads the one takes the rest for a request that this server does not see."""
    data = _body(target)
    chunks = f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"
    lengths = (f"Content-Length: {len(chunks)}", "Transfer-Encoding: chunked")
    reply = target.raw(_head(target, "Content-Type: application/json", *lengths) + chunks)
    return [reply, Reply(f"{WRONG}accepted both" if reply.status == 200 else "refused", b"", 0.0)]


def _lengths(target: Target) -> Replies:
    """Lengths that are not a number, two, negative, too large, and beyond 64 bits."""
    values = ("abc", "-1", "1_0", "+2", "9" * 400, str(2**64), "4 4")
    replies = [target.raw(_head(target, f"Content-Length: {value}") + b"{}", seconds=8) for value in values]
    return [*replies, target.raw(_head(target, "Content-Length: 2", "Content-Length: 3") + b"{}", seconds=8)]


def _hosts(target: Target) -> Replies:
    """Host headers of other names; each must be refused."""
    data = _body(target)
    size = f"Content-Length: {len(data)}"
    names = (
        "[::1]evil.com",
        "evil.com",
        "127.0.0.1.evil.com",
        "localhost.evil.com",
        "[::1",
        "evil.com:80",
        "a" * 5000,
        "\t",
    )
    replies = [target.raw(_head(target, size, host=name) + data) for name in names]
    accepted = [name[:40] for name, reply in zip(names, replies, strict=True) if reply.status == 200]
    return [*replies, Reply(f"{WRONG}accepted {accepted}" if accepted else "all refused", b"", 0.0)]


def _headers(target: Target) -> Replies:
    """Many headers, and a long one."""
    many = [f"X-{number}: {number}" for number in range(5000)]
    return [
        target.raw(_head(target, *many)),
        target.raw(_head(target, "X: " + "a" * 500_000)),
        target.raw(b"\0" * 100_000),
    ]


def _pipelined(target: Target) -> Replies:
    """2,000 requests on one connection, whose answers are not read."""
    one = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n\r\n".encode()
    end = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\nConnection: close\r\n\r\n".encode()
    return [target.raw(one * 2000 + end)]


def _chunks(target: Target) -> Replies:
    """A body of 300,000 chunks of a byte."""
    data = _body(target).ljust(300_000)
    head = _head(target, "Content-Type: application/json", "Transfer-Encoding: chunked")
    return [target.raw(head + b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n")]


def _resets(target: Target) -> Replies:
    """1,000 connections that end at once, with a reset."""
    begin = time.monotonic()
    for _ in range(1000):
        with suppress(OSError), target.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    return [Reply("reset", b"", time.monotonic() - begin)]


def _paths(target: Target) -> Replies:
    """Paths that are long, encoded, or to files."""
    paths = (
        "/" + "a" * 60_000,
        "/v1/models/" + "%2e%2e%2f" * 20,
        "/../../etc/passwd",
        "/v1/models/%00",
        "/%ff%fe",
        "//",
        "/v1/models/" + "+".join("ab" * 500),
    )
    return [target.post(path, {}) for path in paths]


ATTACKS: Sequence[Attack] = (
    Attack("idle", "5", "300 idle connections", lambda target: _idle(target, b"")),
    Attack("idle-half", "5", "300 connections with half a request", lambda target: _idle(target, b"POST /v1/chat")),
    Attack(
        "idle-files",
        "5",
        "300 idle connections, with 128 open files",
        lambda target: _idle(target, b""),
        ("--max-connections", "1000"),
        128,
    ),
    Attack("slow-bodies", "5", "20 bodies that arrive byte by byte", _slow),
    Attack("unread", "5", "20 streams that are not read", _unread),
    Attack("both-lengths", "6", "Content-Length with Transfer-Encoding", _both_lengths),
    Attack("lengths", "6", "odd Content-Lengths", _lengths),
    Attack("hosts", "6", "Host headers of other names", _hosts),
    Attack("headers", "5", "5,000 headers, a header of 500 kB, zeros", _headers),
    Attack("pipelined", "5", "2,000 requests on one connection", _pipelined),
    Attack("chunks", "5", "a body of 300,000 chunks", _chunks),
    Attack("resets", "5", "1,000 connections that are reset", _resets),
    Attack("paths", "6", "odd paths", _paths),
)
