"""Which versions are in use: a process that has one open holds a shared lock of its kit.json, which ends with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from edgetune_runtime.formats.regular_file import open_regular

from .kit import KIT_NAME


class VersionsInUse:
    """The versions that a process has open, with these bundles at first; they are not deleted meanwhile."""

    def __init__(self, bundles: Iterable[Path] = ()) -> None:
        self._locks: dict[Path, BinaryIO | None] = {}
        self.use(bundles)

    def use(self, bundles: Iterable[Path]) -> None:
        """Use the versions with these bundles, and no other ones; a bundle that is not in a store needs nothing."""
        now = {bundle: self._locks[bundle] if bundle in self._locks else _lock(bundle) for bundle in bundles}
        before, self._locks = self._locks, now
        for bundle, lock in before.items():
            if bundle not in now and lock is not None:
                lock.close()


def is_in_use(version: Path) -> bool:
    """Whether a process has the version in this folder open."""
    if sys.platform == "win32":
        return False
    import fcntl  # noqa: PLC0415 - Windows has none

    try:
        with open_regular(version / KIT_NAME, follows_links=False) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # Without kit.json, or on a file system without locks.
        return False
    return False


def _lock(bundle: Path) -> BinaryIO | None:
    """The lock of a bundle's version; None if it is not in a store."""
    if sys.platform != "win32":
        with suppress(OSError), ExitStack() as stack:
            file = stack.enter_context(open_regular(bundle.parent / KIT_NAME, follows_links=False))
            import fcntl  # noqa: PLC0415 - as above

            # Waits for a moment if `is_in_use` looks at this version.
            fcntl.flock(file, fcntl.LOCK_SH)
            stack.pop_all()
            return file
    return None
