"""Replies of HTTP that fail when their content comes too slowly, also where http.client would read on for ever."""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

_GRACE_S, _SLOWEST_BYTES_PER_S = 60.0, 1000
"""A server that sends less content than this on average has failed after the grace."""


class _Received(io.RawIOBase):
    """All bytes of a reply; OSError if its content comes too slowly, of which `content_bytes` have been read.

    Heads, and the sizes, extensions and trailers of chunks do not count: a server can send any number of them.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._begin, self.content_bytes = time.monotonic(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - any buffer
        """Receive some bytes."""
        count = self._raw.readinto(buffer)
        elapsed_s = time.monotonic() - self._begin
        if elapsed_s > _GRACE_S and self.content_bytes < elapsed_s * _SLOWEST_BYTES_PER_S:
            raise OSError(f"it came too slowly: {self.content_bytes} bytes in {elapsed_s:.0f} s")
        return count

    def close(self) -> None:
        """Close the reply's view of the connection."""
        self._raw.close()
        super().close()


class Reply(http.client.HTTPResponse):
    """A reply that fails this way, for `http.client.HTTPConnection.response_class`."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - as its base
        super().__init__(sock, *arguments, **options)
        self._received = _Received(self.fp.detach())
        self.fp = io.BufferedReader(self._received)

    def read(self, amt: int | None = None) -> bytes:
        """As its base; what one call reads counts only when it returns, so read large content in parts."""
        return self._counted(super().read(amt))

    def read1(self, n: int = -1) -> bytes:
        """As its base."""
        return self._counted(super().read1(n))

    def _counted(self, data: bytes) -> bytes:
        self._received.content_bytes += len(data)
        return data
