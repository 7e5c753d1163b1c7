"""When a bundle may be used: until it is closed, and only in the process that opened it."""

from __future__ import annotations

import ctypes
import os
from weakref import WeakSet

from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import CLOSED

FORKED = "the bundle was opened before this process was forked", "open it after the fork, or start processes by spawn"


class Lifetime:
    """The lifetime of a bundle that this process opens now."""

    def __init__(self) -> None:
        self.is_closed = False
        self._process = os.getpid()

    @property
    def is_of_parent(self) -> bool:
        """Whether this process was forked after the bundle was opened, so that it lacks the bundle's threads."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise UsageError where the bundle is closed, or is the parent's."""
        if self.is_closed:
            raise UsageError(*CLOSED)
        if self.is_of_parent:
            raise UsageError(*FORKED)


_OPENED = WeakSet[object]()


def never_free_in_forks(bundle: object) -> None:
    """Keep a bundle in memory to the end of each process that is forked: freeing it would wait for missing threads."""
    _OPENED.add(bundle)


def _keep_opened() -> None:
    for bundle in list(_OPENED):
        # A variable of a module would be cleared when Python exits.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(bundle))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_opened)
