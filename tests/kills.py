"""Runs an action in a child process that is killed at one of its writes, or whose disk is full from then on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Container

_CHANGES = {
    *("os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"),
    *("shutil.rmtree", "fcntl.flock"),
}
_NEEDS_SPACE = {"open", "os.link", "os.symlink", "os.mkdir"}
KILLED = 9


def changes_a_file(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an audit event of Python is the start of a write."""
    if event == "open":
        _, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) or (isinstance(mode, str) and mode not in {"r", "rb"})
    return event in _CHANGES


def killed_at(write: int, action: Callable[[], int], within: str = "") -> int:
    """Run `action`, killed at this write of those whose path has `within`; its exit code."""

    def reach(_: str, count: int) -> None:
        if count == write:
            os._exit(KILLED)

    return _run(action, within, reach)


def full_from(write: int, action: Callable[[], int]) -> int:
    """Run `action` on a disk that is full from this write on; its exit code."""
    return _failing(errno.ENOSPC, write, action, _NEEDS_SPACE)


def read_only_from(write: int, action: Callable[[], int]) -> int:
    """Run `action` on a disk that can only be read from this write on, as after an error of its; its exit code."""
    return _failing(errno.EROFS, write, action, _NEEDS_SPACE | _CHANGES)


def _failing(number: int, write: int, action: Callable[[], int], events: Container[str]) -> int:
    def reach(event: str, count: int) -> None:
        if count >= write and event in events:
            raise OSError(number, os.strerror(number))

    return _run(action, "", reach)


def _run(action: Callable[[], int], within: str, reach: Callable[[str, int], None]) -> int:
    """Run `action` in a child process, where `reach` gets each write's event and number; the exit code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if changes_a_file(event, arguments) and within in str(arguments):
            count += 1
            reach(event, count)

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.addaudithook(hook)
    os._exit(action())
