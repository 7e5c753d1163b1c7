"""Accept connections within the number of files that the process may open, as each connection is one."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time

_LOG = logging.getLogger(__name__)
_OTHER_FILES = 192
"""Files of the bundle, and connections that are accepted before those that make room for them are closed."""
_PAUSE_S = 0.01
_QUEUE = 1024
"""Connections that the system holds until they are accepted; the client of one more tries again a second later."""
BACKLOG = 64
"""Connections that asyncio accepts before it counts the first of them."""


class Listener(socket.socket):
    """A listening socket that also accepts without a free file descriptor: it closes such a connection at once.

    asyncio would log each failure, and listen again once for each.
    """

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(fileno=listening.detach())
        self._spare: int | None = _spare()

    def listen(self, backlog: int = _QUEUE, /) -> None:
        """Listen with a long queue, whatever the backlog: asyncio's is also how many it accepts at a time."""
        super().listen(max(backlog, _QUEUE))

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection; BlockingIOError if there is none, or none could be accepted."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _LOG.warning("closed a connection, because too many files are open: %s", error)
            self._close_next()
            raise BlockingIOError from error

    def close(self) -> None:
        """Stop listening."""
        self._free_spare()
        super().close()

    def _close_next(self) -> None:
        if self._spare is None:
            # Another thread took the descriptor, and until one is free the event loop would do nothing else.
            time.sleep(_PAUSE_S)
        self._free_spare()
        try:
            super().accept()[0].close()
        except OSError:
            pass
        finally:
            self._spare = _spare()

    def _free_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def connections_within_files(limit: int) -> int:
    """How many of `limit` connections the process may have open; raises its soft limit of open files if it must."""
    if sys.platform == "win32":
        return limit
    import resource  # noqa: PLC0415 - not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limit + _OTHER_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fitting = limit if soft == resource.RLIM_INFINITY else min(limit, max(soft - _OTHER_FILES, soft // 2))
    if fitting < limit:
        _LOG.warning("at most %d connections instead of %d, because %d files may be open", fitting, limit, soft)
    return fitting


def _spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
