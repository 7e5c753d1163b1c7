"""Writes that survive a power cut, and the locks of a prefix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from edgetune_runtime.errors import BusyError, UsageError
from edgetune_runtime.formats.atomic import flush_to_disk, raising_out_of_space, replacing

LOCK_NAME, INSTALLING_NAME = LOCK_NAMES = ("lock", "installing.lock")
"""Held by each command while it changes a prefix; and by what installs a version, while it receives files too."""


def write_text(path: Path, text: str, *, mode: int = 0o644) -> bool:
    """Replace a file atomically, on disk when this returns, unless it has this text; returns whether it was written."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    with replacing(path) as temporary:
        # Never readable for more users than the mode says.
        temporary.touch(mode=mode)
        temporary.chmod(mode)
        temporary.write_text(text, encoding="utf-8")
    flush_to_disk(path.parent)
    return True


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` by an atomic rename, on disk when this returns."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    with raising_out_of_space(link):
        temporary.symlink_to(target)
    temporary.replace(link)
    flush_to_disk(link.parent)


def flush_tree(root: Path) -> None:
    """Flush all files and folders below `root` to disk; links are not followed."""
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                flush_to_disk(path)
        flush_to_disk(Path(folder))


@contextmanager
def locked(prefix: Path, name: str = LOCK_NAME) -> Iterator[None]:
    """Hold the lock of `prefix` while the block runs; BusyError if another process holds it.

    Creates the folder. UsageError if this user may not write there.
    """
    try:
        prefix.mkdir(parents=True, exist_ok=True)
        file = (prefix / name).open("ab")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"cannot write to {prefix}: {error.strerror}", "choose another --prefix") from error
    import fcntl  # noqa: PLC0415 - Windows has none

    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another install is using {prefix}", "wait until it ends") from error
        yield


def installing(prefix: Path) -> AbstractContextManager[None]:
    """Keep other installs and updates from `prefix` while the block runs; errors as those of `locked`.

    Files that it receives, and versions that are not the current one, are this block's; it may take hours. To change
    what is the current version, or what is remembered, it must hold the lock too.
    """
    return locked(prefix, INSTALLING_NAME)
