"""Writes that survive a power cut, and the locks of a prefix."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from edgetune_runtime.errors import BusyError, UsageError
from edgetune_runtime.formats.atomic import flush_to_disk, raising_out_of_space, replacing

LOCK_NAME, INSTALLING_NAME = LOCK_NAMES = ("lock", "installing.lock")
"""The first is held while a prefix is changed, the second during a whole install or update, with its download."""
_WAIT_S, _PAUSE_S = 60.0, 0.1
"""How long an install or update waits for others that change a prefix, such as a start."""


def write_text(path: Path, text: str, *, mode: int = 0o644) -> bool:
    """Replace a file atomically, on disk when this returns, unless it has this text; returns whether it was written."""
    data = text.encode()
    # Somebody else may have put a larger file there.
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    with replacing(path) as temporary:
        # Never readable for more users than the mode says.
        temporary.touch(mode=mode)
        temporary.chmod(mode)
        temporary.write_bytes(data)
    flush_to_disk(path.parent)
    return True


def write_for_all() -> None:
    """Let all accounts read what root writes from now on, whatever its umask is: a unit runs as another account."""
    if os.geteuid() == 0:
        os.umask(0o022)


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` by an atomic rename, on disk when this returns."""
    temporary = unfinished(link)
    temporary.unlink(missing_ok=True)
    with raising_out_of_space(link):
        temporary.symlink_to(target)
    temporary.replace(link)
    flush_to_disk(link.parent)


def unfinished(link: Path) -> Path:
    """The name of a link that `replace_link` has not renamed yet."""
    return link.with_name(f".{link.name}.new")


def flush_tree(root: Path) -> None:
    """Flush all files and folders below `root` to disk; links are not followed."""
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                flush_to_disk(path)
        flush_to_disk(Path(folder))


@contextmanager
def locked(prefix: Path, name: str = LOCK_NAME, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of `prefix` while the block runs; BusyError if another process holds it for longer than `wait_s`.

    Creates the folder. UsageError if this user may not write there.
    """
    try:
        prefix.mkdir(parents=True, exist_ok=True)
        file = (prefix / name).open("ab")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"cannot write to {prefix}: {error.strerror}", "choose another --prefix") from error
    import fcntl  # noqa: PLC0415 - Windows has none

    with file:
        end_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end_s:
                    raise BusyError(f"another command is using {prefix}", "wait until it ends") from error
            time.sleep(_PAUSE_S)
        yield


def installing(prefix: Path) -> AbstractContextManager[None]:
    """Keep other installs and updates from `prefix` while the block runs; errors as those of `locked`.

    Files that it receives, and versions that are not the current one, are this block's; it may take hours. To change
    what is the current version, or what is remembered, it must be `changing` the prefix too.
    """
    return locked(prefix, INSTALLING_NAME)


def changing(prefix: Path) -> AbstractContextManager[None]:
    """The lock for a block within `installing`, which waits for it: hours of a download are not to be lost."""
    return locked(prefix, wait_s=_WAIT_S)
