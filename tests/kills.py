"""Runs an action in a child process that is killed at one of its writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

_CHANGES = {
    *("os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"),
    *("shutil.rmtree", "fcntl.flock"),
}
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
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if changes_a_file(event, arguments) and within in str(arguments):
            count += 1
            if count == write:
                os._exit(KILLED)

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.addaudithook(hook)
    os._exit(action())
