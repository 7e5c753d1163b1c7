"""Opens the listening socket for a host and a port, and determines who can reach it."""

from __future__ import annotations

import socket

from edgetune_runtime.errors import UsageError

from .accepting import Listener
from .settings import is_loopback

_LAST_PORT = 65_535


def bind(host: str, port: int) -> Listener:
    """A listening socket; UsageError for a host or a port that cannot be had."""
    if not 0 <= port <= _LAST_PORT:
        # The system would take another port without a word.
        raise UsageError(f"port is {port}", f"give 0 to {_LAST_PORT}; 0 takes a free one")
    try:
        family, _, _, _, address = min(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
            # `localhost` has two addresses, and more clients try the one of IPv4.
            key=lambda info: info[0] != socket.AF_INET,
        )
        return Listener(socket.create_server(address[:2], family=family))
    except OSError as error:
        message = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise UsageError(message, "choose another address or port; port 0 takes a free one") from error


def can_be_reached(host: str) -> bool:
    """Whether other machines can reach a server on this host; UsageError for an unknown host."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"host {host!r} is unknown: {error.strerror}", "give an IP address of this machine") from error
    return not all(is_loopback(str(address[0])) for *_, address in addresses)


def url_of(listening: socket.socket, scheme: str = "http") -> str:
    """The address of a server for clients on this machine."""
    host, port = listening.getsockname()[:2]
    if listening.family == socket.AF_INET6:
        return f"{scheme}://[{'::1' if host == '::' else host}]:{port}"
    return f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
