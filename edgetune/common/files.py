"""Writes files that appear when they are complete, links files where the file system can, and expands `~`."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgetune_runtime.bundle import FileEntry, sha256_of
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.atomic import flush_to_disk, replacing


def expanded(path: str) -> Path:
    """The path with the home folder for `~` or `~user` at its beginning; as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_file(path: Path, data: str | bytes, *, is_private: bool = False, is_durable: bool = False) -> None:
    """Write a text in UTF-8, or bytes, to a file, which is replaced if there is one; makes its folder.

    Other users can never read a private one; a durable one has its name on disk, too, when this returns.
    OutOfSpaceError if the disk is full.
    """
    with replacing(path) as temporary:
        temporary.touch(0o600 if is_private else 0o666)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    if is_durable:
        flush_to_disk(path.parent)


def is_whole(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there, undamaged."""
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256


def put_whole(path: Path, entry: FileEntry, source: Path | bytes) -> None:
    """Make `path` a copy of `source`, on disk when this returns; VerificationError if that has another digest."""
    with replacing(path) as temporary:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        if sha256_of(temporary) != entry.sha256:
            raise VerificationError(f"{source!s} was changed while it was copied", "run the command again")
    flush_to_disk(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where the file system has no links; makes its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
