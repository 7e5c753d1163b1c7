"""Checks whether a TCP port of this machine is free, and whether a process listens on it."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.errors import UsageError

_ENDING_S = 5.0
"""Time to free its port for a program that is about to end."""
_LISTENING = "0A"
"""State of a socket in Linux' include/net/tcp_states.h."""


def require_free(host: str, port: int) -> None:
    """UsageError if another program listens on the port of this IP address."""
    end = time.monotonic() + _ENDING_S
    while _is_taken(host, port):
        if time.monotonic() > end:
            message = f"another program listens on port {port} of {host}"
            raise UsageError(message, f"choose another --port, or stop it: ss -ltnp 'sport = :{port}'")
        time.sleep(0.1)


def listens(pid: int, port: int) -> bool:
    """Whether this process listens on the port of any address; True if its sockets are hidden from this user."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    try:
        files = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    for file in files:
        # It may be closed by now.
        with suppress(FileNotFoundError):
            if str(file.readlink()) in sockets:
                return True
    return False


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        # Any other error is the server's to report.
        return error.errno == errno.EADDRINUSE
    return False


def _listening(port: int) -> set[str]:
    """The inodes of the sockets that listen on this port."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.exists():
            rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == _LISTENING and row[1].endswith(f":{port:04X}")}
    return inodes
