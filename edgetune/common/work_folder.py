"""The folder `<out>.work` with the intermediate files of a build, which one process writes at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.atomic import TEMPORARY
from filelock import FileLock, Timeout

_LOCK = "lock"


def named(folder: Path) -> Path:
    """The folder by a path with its name, which `.` and `..` do not have; UsageError for the root, which has none."""
    path = folder if folder.name not in ("", "..") else folder.resolve()
    if not path.name:
        raise UsageError(f"{path} is the root of the file system, not a folder for a bundle", "choose a folder in it")
    return path


def beside(folder: Path, suffix: str) -> Path:
    """The path next to the folder that has its name and a suffix."""
    folder = named(folder)
    return folder.with_name(f"{folder.name}{suffix}")


def work_folder(out: Path) -> Path:
    """The work folder of the bundle `out`."""
    return beside(out, ".work")


def rebased_folder(bundle: Path) -> Path:
    """Where the bundle on another base is by default."""
    return beside(bundle, "-rebased")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder, and hold its lock in the block; the system releases the lock of a process that ends.

    Temporary files of a process that was killed are deleted, and so is a folder that is still empty at the end. Raises
    UsageError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        message = f"another process is using {folder}"
        raise UsageError(message, "wait until it has ended, or choose another folder") from error
    for path in [path for path in folder.rglob(".*") if TEMPORARY in path.name]:
        _delete(path)
    try:
        yield
    finally:
        if all(path.name == _LOCK for path in folder.iterdir()):
            with suppress(OSError):  # another build may be about to start
                (folder / _LOCK).unlink()
                folder.rmdir()
        lock.release()


def clear(folder: Path) -> None:
    """Delete what an earlier build left in the folder, if it exists."""
    for path in folder.glob("*"):
        if path.name != _LOCK:
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
