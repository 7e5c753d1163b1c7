"""Runs an action in a child process that is killed at its writes, or whose disk is full from one of them on."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path

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


def left_by_kills(action: Callable[[], int], folder: Path) -> Iterator[bool]:
    """Put a folder into each state that a kill of `action` at a write leaves, and last into that after its end.

    Yields whether it is one of a kill. The action runs once: at each write, the folder is copied as it is, which is as
    a process that ends there leaves it; what it changes elsewhere is that of a whole run. Equal states come once, as
    between many writes nothing is changed on the disk.
    """
    states, known = folder.with_name(f"{folder.name}-states"), set[bytes]()
    states.mkdir()

    def keep(_: str, count: int) -> None:
        state = _digest(folder)
        if state not in known:
            known.add(state)
            _copy(folder, _made(states / f"{count:04}") / folder.name)

    assert _run(action, "", keep) == 0
    _copy(folder, _made(states / "end") / folder.name)
    for kept in sorted(states.iterdir()):
        _copy(kept / folder.name, folder)
        yield kept.name != "end"


def _digest(folder: Path) -> bytes:
    """What tells states of a folder apart: names, modes, links and contents."""
    digest = hashlib.sha256()
    for path in [folder, *sorted(folder.rglob("*"))] if folder.exists() else []:
        about = path.lstat()
        target = path.readlink() if path.is_symlink() else ""
        digest.update(f"{path.relative_to(folder)} {about.st_mode} {about.st_nlink} {target}\n".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.digest()


def _made(state: Path) -> Path:
    """A new folder, for the copy of one that may be gone."""
    state.mkdir()
    return state


def _copy(folder: Path, to: Path) -> None:
    """Make `to` a copy of a folder; there is none if the folder is gone. The programs are faster than Python."""
    subprocess.run(["rm", "-rf", str(to)], check=True)
    if folder.exists():
        subprocess.run(["cp", "-a", str(folder), str(to)], check=True)


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
