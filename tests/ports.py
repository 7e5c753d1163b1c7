"""Ports of loopback for servers of tests, and servers with handlers of their own."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def http_server(
    handler: type[BaseHTTPRequestHandler], port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """The address of a server with this handler, which logs nothing, in the block; port 0 is any free one."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", port), quiet) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        # By default it looks every half second whether it shall end.
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Posted:
    """What a server of `replying` was sent."""

    path: str
    headers: Message
    body: bytes


@contextmanager
def replying(*replies: tuple[int, bytes]) -> Iterator[tuple[str, list[Posted]]]:
    """The address of a server, and what it was sent: each POST gets the next status and body, or the last again."""
    got: list[Posted] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = replies[min(len(got), len(replies) - 1)]
            got.append(Posted(self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http_server(Handler) as address:
        yield address, got


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Wait until something listens on a port; ConnectionError if nothing does in time."""
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except ConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
