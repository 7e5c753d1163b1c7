"""Ports of loopback for servers of tests."""

from __future__ import annotations

import socket
import time


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Wait until something listens on a port; ConnectionError if nothing does in time."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except ConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
