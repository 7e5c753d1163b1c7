"""Limits the open connections, in total and per address; connections that wait for their client make room."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .settings import is_loopback

_NETWORK_BITS = 64
"""One IPv6 client may use all addresses of its network."""


@dataclass(frozen=True, eq=False)
class ClientConnection:
    """An open connection: its client, and the function that closes it."""

    client: str
    close: Callable[[], None]


class Connections:
    """Lets up to `max_connections` connections be open, and up to `max_per_address` of them from one address.

    This machine's own addresses have no limit of their own, because a reverse proxy brings everyone's requests. Where
    there is no room, the connection is closed that has waited longest for its client, of the client with most of them.
    """

    def __init__(self, max_connections: int, max_per_address: int) -> None:
        self._max_connections, self._max_per_address = max_connections, max_per_address
        self._open: set[ClientConnection] = set()
        self._counts: Counter[str] = Counter()
        # In the order in which they began to wait.
        self._waiting: dict[ClientConnection, None] = {}

    def admit(self, address: str, close: Callable[[], None]) -> ClientConnection | None:
        """Count a new connection, which waits for its client; None if there is no room.

        `close` is called when it has to make room for another one.
        """
        client = _client_of(address)
        if not is_loopback(address) and self._counts[client] >= self._max_per_address:
            has_room = self._close_one([other for other in self._waiting if other.client == client])
        else:
            has_room = len(self._open) < self._max_connections or self._close_one(list(self._waiting))
        if not has_room:
            return None
        connection = ClientConnection(client, close)
        self._open.add(connection)
        self._counts[client] += 1
        self._waiting[connection] = None
        return connection

    def wait(self, connection: ClientConnection) -> None:
        """The connection waits for its client to send or to read, from now on or still."""
        if connection in self._open:
            self._waiting.setdefault(connection)

    def answer(self, connection: ClientConnection) -> None:
        """The connection stays open until it waits again."""
        self._waiting.pop(connection, None)

    def leave(self, connection: ClientConnection) -> None:
        """The connection is closed; a second call does nothing."""
        if connection not in self._open:
            return
        self._open.remove(connection)
        self._waiting.pop(connection, None)
        self._counts[connection.client] -= 1
        if not self._counts[connection.client]:
            del self._counts[connection.client]

    def _close_one(self, candidates: list[ClientConnection]) -> bool:
        if not candidates:
            return False
        connection = max(candidates, key=lambda candidate: self._counts[candidate.client])
        self.leave(connection)
        connection.close()
        return True


def _client_of(address: str) -> str:
    """What connections of one client have in common: their IPv4 address, or their IPv6 network."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((int(parsed), _NETWORK_BITS), strict=False))
