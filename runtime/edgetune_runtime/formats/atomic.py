"""Atomic writes: a file appears under its name only when it is complete."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.errors import OUT_OF_SPACE, OutOfSpaceError, UsageError

_RENAME_EXCHANGE = 2  # linux/fs.h
_REMEDY = "free some space or choose another folder"
TEMPORARY = ".tmp-"
"""What the names of temporary files contain, which begin with a dot too."""


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary path next to `out`; rename it to `out` when the block succeeds, delete it when the block fails.

    Creates the parent folder. Raises OutOfSpaceError when the disk is full.
    """
    with raising_out_of_space(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # In a folder that others may write to, they could put a link at a name that can be known.
    temporary = out.with_name(f".{out.name}{TEMPORARY}{secrets.token_hex(6)}")
    try:
        with raising_out_of_space(out):
            yield temporary
            flush_to_disk(temporary)
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def raising_out_of_space(out: Path) -> Iterator[None]:
    """Turn a "no space left" error in the block into an OutOfSpaceError for `out`.

    The block must not delete what it wrote: a full disk is recognized by its free space.
    """
    try:
        yield
    except OSError as error:
        # numpy's tofile raises OSError without an errno, so check the free space.
        if error.errno not in OUT_OF_SPACE and not (error.errno is None and is_full(out.parent)):
            raise
        raise OutOfSpaceError(f"no space left to write {out}", _REMEDY) from error


@contextmanager
def raising_disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk in the block into one line, which names the path, or `folder` where the error has none.

    OutOfSpaceError when the disk is full, else UsageError.
    """
    try:
        with raising_out_of_space(folder):
            yield
    except BrokenPipeError:
        # Nobody reads the output.
        raise
    except OSError as error:
        message = f"{error.filename or folder}: {error.strerror or error}"
        raise UsageError(message, "check the disk and its permissions") from error


def is_full(folder: Path) -> bool:
    """Whether the disk of an existing folder has less than 1 MiB free, as after a failed write."""
    return shutil.disk_usage(folder).free < 1 << 20


def require_space(out: Path, needed_bytes: int) -> None:
    """Raise OutOfSpaceError unless the disk of `out` has `needed_bytes` free; the parent folder must exist."""
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        message = f"writing {out} needs {needed_bytes / 1e6:.1f} MB, the disk has {free_bytes / 1e6:.1f} MB free"
        raise OutOfSpaceError(message, _REMEDY)


def swap_in(temporary: Path, out: Path) -> None:
    """Rename the folder `temporary` to `out`; an existing one is deleted only after that, and stays if it fails.

    Where the file system can exchange two folders, `out` exists at any moment, also when this process is killed.
    """
    if out.exists() and _exchange(temporary, out):
        flush_to_disk(out.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    try:
        temporary.rename(out)
    except BaseException:
        if aside.exists():
            aside.rename(out)
        raise
    flush_to_disk(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD: relative paths start at the current folder
    return call is not None and call(here, os.fsencode(first), here, os.fsencode(second), _RENAME_EXCHANGE) == 0


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk. Does nothing for folders on Windows, which has no such call."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
