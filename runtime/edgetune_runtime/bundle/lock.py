"""The lock of a bundle's folder, which a process holds while it changes or replaces the bundle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.errors import BusyError


@contextmanager
def locked(bundle: Path) -> Iterator[None]:
    """Keep other processes from changing the bundle; BusyError if one does. No lock without a folder, or on Windows."""
    if sys.platform == "win32" or not bundle.is_dir():
        yield
        return
    import fcntl  # noqa: PLC0415 - Windows has none

    folder = os.open(bundle, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another process changes bundle {bundle}", "try again when it is done") from error
        yield
    finally:
        os.close(folder)
