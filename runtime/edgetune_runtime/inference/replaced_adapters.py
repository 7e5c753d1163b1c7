"""Has calls wait for an adapter that is being replaced, so that they get the new one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from edgetune_runtime.errors import BusyError, NotFoundError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.serving.adapters import RemovedAdapterError
from edgetune_runtime.serving.turns import POLL_S

_REPLACING_S = 60.0
"""How long a call waits: the old adapter stays until the answers that use it have ended."""

T = TypeVar("T")
Pieces = Generator[str, None, None]


class ReplacedAdapters:
    """The adapters that are being replaced. Thread-safe."""

    def __init__(self) -> None:
        self._ended: dict[str, threading.Event] = {}
        self._count = 0

    @contextmanager
    def replacing(self, name: str) -> Iterator[None]:
        """Calls with this adapter wait until the block ends, in which it is removed and another one is added."""
        ended = self._ended[name] = threading.Event()
        self._count += 1
        try:
            yield
        finally:
            del self._ended[name]
            ended.set()

    def any_of(self, names: Collection[str]) -> bool:
        """Whether one of these adapters is being replaced."""
        return any(name in self._ended for name in names)

    def wait(self, names: Iterable[str], check: Callable[[], None] = no_limits) -> None:
        """Wait until none of these adapters is being replaced, or `check` raises; BusyError if that takes too long."""
        end_s = time.monotonic() + _REPLACING_S
        for name in names:
            ended = self._ended.get(name)
            while ended is not None and not ended.wait(POLL_S):
                check()
                if time.monotonic() >= end_s:
                    raise BusyError(f"adapter {name!r} is being replaced, and running calls use it", "call again")

    def pieces(self, prepare: Callable[[], Pieces]) -> Pieces:
        """The pieces of the answer that `prepare` prepares, again if its adapter was replaced before it began."""
        return _begun(self.prepared(prepare), partial(self.prepared, prepare))

    def prepared(self, prepare: Callable[[], T]) -> T:
        """What `prepare` returns; it is called again if it lacked an adapter that was being replaced."""
        while True:
            count = self._count
            try:
                return prepare()
            except NotFoundError:
                if self._count == count:
                    raise


def _begun(pieces: Pieces, prepare: Callable[[], Pieces]) -> Pieces:
    while True:
        try:
            yield from pieces
            return
        except RemovedAdapterError:
            pieces = prepare()
