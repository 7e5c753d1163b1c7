"""A server under attack: its process with its memory and log, an attacker's connections, and another client's waits."""

from __future__ import annotations

from benchmarks.harness.memory import family_mb
from benchmarks.harness.server import serving

import http.client
import io
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

OPTIONS = (
    "--max-request-s", "4", "--max-client-s", "3", "--max-connections", "64", "--max-waiting", "8",
    "--max-grace-s", "1", "--contexts", "2", "--cache-mb", "64",
)  # fmt: skip
"""Short limits, so that an attack that they end takes seconds. Many prompts fill the cache of states, to its limit.

While long answers hold all contexts, another client waits for the limit of a
request: the target must leave room for it.
"""
MEMORY_MB = 4000
"""Address space of the server: what asks for more aborts it, and not another process of this machine."""
ANSWER_S = 30.0
"""An attacker's patience: well beyond the limit of a request."""
OTHER_ADDRESS = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""The other client's own address, as limits may be per address."""
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Reply:
    """What a request got: its HTTP status, or why there is none, the body, and the seconds until its end."""

    status: int | str
    body: bytes
    seconds: float


@dataclass(frozen=True)
class Names:
    """The models of the bundle: its base, and its adapters."""

    base: str
    adapters: Sequence[str]


@dataclass(frozen=True)
class Target:
    """What an attacker sees of the server."""

    port: int
    names: Names

    def post(self, path: str, body: Mapping[str, Any] | bytes, *, seconds: float = ANSWER_S) -> Reply:
        """Send a body to a path, and wait for the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        return request(self.port, "POST", path, data, seconds=seconds)

    def chat(self, text: str = "hi", /, **fields: object) -> Reply:
        """Ask the base over OpenAI's API."""
        return self.post("/v1/chat/completions", chat_body(self.names.base, text, **fields))

    def at_once(self, count: int, path: str, body: Mapping[str, Any]) -> list[Reply]:
        """The same request, many times at once."""
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda: replies.append(self.post(path, body))) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return replies

    def leave(self, path: str, body: Mapping[str, Any], *, after_s: float = 0.3) -> Reply:
        """Send a body, and disconnect before the answer."""
        return self.post(path, body, seconds=after_s)

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S)

    def raw(self, data: bytes, *, seconds: float = ANSWER_S) -> Reply:
        """Send bytes as they are, and read until the server closes the connection."""
        begin, received, status = time.monotonic(), b"", "no answer"
        try:
            with self.connect() as connection:
                connection.settimeout(seconds)
                connection.sendall(data)
                while part := connection.recv(65536):
                    received += part
        except OSError as error:
            status = type(error).__name__
        with suppress(http.client.HTTPException):
            # What is not an answer, or ends too early, keeps the status of the connection.
            response = http.client.HTTPResponse(cast("socket.socket", _Received(received)))
            response.begin()
            return Reply(response.status, response.read(), time.monotonic() - begin)
        return Reply(status, b"", time.monotonic() - begin)


class _Received:
    """A connection's bytes, with the one method of a socket that http.client reads answers by."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        """The bytes as a file."""
        return io.BytesIO(self._data)


def chat_body(model: str, text: str, /, **fields: object) -> dict[str, Any]:
    """A short question in OpenAI's form."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def request(port: int, method: str, path: str, data: bytes | None, *, seconds: float, address: str = "") -> Reply:
    """One request on a connection of its own."""
    begin = time.monotonic()
    source = (address, 0) if address else None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds, source_address=source)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json"} if data is not None else {})
        response = connection.getresponse()
        # A client that waits for each byte would wait forever for one that sends them slowly.
        body = response.read(4_000_000)
        return Reply(response.status, body, time.monotonic() - begin)
    except (OSError, http.client.HTTPException) as error:
        return Reply(type(error).__name__, b"", time.monotonic() - begin)
    finally:
        connection.close()


class OtherClient(threading.Thread):
    """Asks a short question and for the server's health in a loop, and records the waits."""

    def __init__(self, port: int, model: str) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self.statuses: Counter[str] = Counter()
        self._port, self._ends = port, threading.Event()
        self._body = json.dumps(chat_body(model, "good morning")).encode()

    def run(self) -> None:
        """Ask until `end`."""
        while not self._ends.is_set():
            self._ask("POST", "/v1/chat/completions", self._body)
            self._ask("GET", "/healthz", None)
            self._ends.wait(0.05)

    def end(self) -> None:
        """Wait for the last answer."""
        self._ends.set()
        self.join(2 * ANSWER_S)

    def _ask(self, method: str, path: str, data: bytes | None) -> None:
        reply = request(self._port, method, path, data, seconds=ANSWER_S, address=OTHER_ADDRESS)
        self.longest_s = max(self.longest_s, reply.seconds)
        self.statuses[str(reply.status)] += 1


@dataclass
class Server:
    """The process of a server; its memory includes that of its helper processes."""

    process: subprocess.Popen[str]
    target: Target
    log: Path
    peak_mb: float = 0.0

    @property
    def resident_mb(self) -> float:
        """Resident memory (PSS) in MB (10^6 bytes)."""
        return family_mb(self.process.pid)

    @property
    def lives(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def watch(self, ends: threading.Event) -> None:
        """Record the peak of the memory until the end."""
        while not ends.wait(_SAMPLE_S):
            self.peak_mb = max(self.peak_mb, self.resident_mb)


@contextmanager
def attacked_server(
    bundle: Path, names: Names, work: Path, options: Sequence[str], open_files: int
) -> Iterator[Server]:
    """A server for the bundle with short limits, which has answered a question of each kind once."""
    environment = {"EDGETUNE_CACHE": str(work / "states")}
    limit, ends = partial(_limit_process, open_files=open_files), threading.Event()
    with (
        (work / "server.log").open("w") as log,
        serving(bundle, [*OPTIONS, *options], environment=environment, log=log, limit=limit) as started,
    ):
        server = Server(started.process, Target(started.port, names), work / "server.log")
        _warm(server.target)
        threading.Thread(target=server.watch, args=(ends,), daemon=True).start()
        try:
            yield server
        finally:
            ends.set()


def _limit_process(pid: int, open_files: int) -> None:
    """Limit the address space and the open files of a process that has just started, and of those that it starts."""
    resource.prlimit(pid, resource.RLIMIT_AS, (MEMORY_MB * 10**6,) * 2)
    resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files, open_files))


def _warm(target: Target) -> None:
    """Ask once for what stays in memory after its first use."""
    for name in (target.names.base, *target.names.adapters):
        target.post("/v1/chat/completions", chat_body(name, "hi"))
    target.chat(response_format=schema_format({"type": "boolean"}))


def schema_format(schema: object) -> dict[str, Any]:
    """OpenAI's `response_format` of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
