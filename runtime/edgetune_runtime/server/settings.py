"""The access rules and the limits of a server."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from functools import cached_property

_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[\w.~%-]+)?)\]|(?P<name>[\w.-]*))(?::[0-9]*)?", re.ASCII)


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one server.

    A request body has at most `body_bytes`, an answer at most `answer_tokens` tokens, and one request asks for at most
    `answers` answers. Up to `waiting` requests wait for others. A request takes at most `request_s` seconds, waiting
    included; it waits for a quarter longer, and if it had to wait, it has at least a quarter for its answers. A client
    that sends or reads nothing for `client_s` seconds while it should is disconnected. At most `connections` are open
    at once, `connections_per_address` of them from one address. A stopping server gives running answers `grace_s`
    seconds.
    """

    body_bytes: int = 2_000_000
    answer_tokens: int = 1024
    answers: int = 8
    waiting: int = 32
    request_s: float = 300.0
    client_s: float = 20.0
    connections: int = 256
    connections_per_address: int = 64
    grace_s: float = 20.0


@dataclass(frozen=True)
class Access:
    """Who may call a server.

    A request needs one of `keys`, if there are any. Its Host header must be an IP address, a name of this machine or
    one of `hosts`: a web page whose name was made to resolve to this machine (DNS rebinding) has another. The Origin
    that browsers send with a page's requests must be the server's own or one of `origins`, which also get CORS headers.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @cached_property
    def _names(self) -> frozenset[str]:
        hostname = socket.gethostname().lower()
        own = (hostname, hostname.partition(".")[0])
        hosts = (host.lower() for host in self.hosts)
        return frozenset(("localhost", *own, *(f"{name}.local" for name in own), *hosts))

    def allows_host(self, header: str) -> bool:
        """Whether a request with this Host header may be answered."""
        name = host_of(header)
        return name in self._names or _is_address(name)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a socket bound to `address`."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def host_of(header: str) -> str:
    """A Host header without its port and the brackets of an IPv6 address; empty for an invalid one."""
    match = _HOST.fullmatch(header)
    return "" if match is None else (match["ipv6"] or match["name"]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
