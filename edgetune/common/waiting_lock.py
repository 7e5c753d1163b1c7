"""A lock between processes; whoever has to wait for it says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .progress import Progress


@contextmanager
def waiting_lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file `path` in the block."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress.say(f"waiting for another process that uses {path.parent}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
