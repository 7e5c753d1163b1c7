"""Replies of HTTP that fail when a server sends them too slowly, also in their head, where http.client waits on."""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

_GRACE_S, _SLOWEST_BYTES_PER_S = 60.0, 1000
"""A server that sends less than this on average has failed after the grace."""


def is_too_slow(begin: float, count: int) -> bool:
    """Whether a server that has sent so many bytes since `begin` has failed."""
    elapsed_s = time.monotonic() - begin
    return elapsed_s > _GRACE_S and count < elapsed_s * _SLOWEST_BYTES_PER_S


class _Received(io.RawIOBase):
    """All bytes of a reply, its head and the sizes of its chunks too; OSError if they come too slowly."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._begin, self._count = time.monotonic(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - any buffer
        """Receive some bytes."""
        count = self._raw.readinto(buffer)
        self._count += count or 0
        if is_too_slow(self._begin, self._count):
            raise OSError(f"it came too slowly: {self._count} bytes in {time.monotonic() - self._begin:.0f} s")
        return count

    def close(self) -> None:
        """Close the reply's view of the connection."""
        self._raw.close()
        super().close()


class Reply(http.client.HTTPResponse):
    """A reply that fails this way, for `http.client.HTTPConnection.response_class`."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - as its base
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Received(self.fp.detach()))
