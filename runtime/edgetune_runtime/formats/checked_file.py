"""Files with a checksum: a line of JSON with kind, version, facts, length and CRC-32, then the bytes.

Reading returns None for a file that is damaged or of another kind.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgetune_runtime.errors import parsing
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

from .atomic import replacing
from .regular_file import open_regular

VERSION = 1

_LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class CheckedFile:
    """The facts and the bytes of a file."""

    about: Mapping[str, Any]
    data: memoryview


def write_checked(path: Path, kind: str, about: Mapping[str, Any], data: memoryview) -> None:
    """Write a file atomically that only this user can read; OutOfSpaceError if the disk is full, or OSError."""
    head = {kind: VERSION, "bytes": len(data), "crc32": zlib.crc32(data), "about": about}
    with replacing(path) as temporary, open(temporary, "wb", opener=_open_private) as file:
        # As ASCII, because a text of the caller may have half a surrogate pair, which UTF-8 does not have.
        file.write(json.dumps(head, separators=(",", ":")).encode() + b"\n")
        file.write(data)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_checked(
    path: Path, kind: str, *, max_bytes: float = math.inf, follows_links: bool = True
) -> CheckedFile | None:
    """Read a file of `write_checked`; None if it is missing, damaged, larger, of another kind or no regular file."""
    try:
        with open_regular(path, follows_links=follows_links) as file:
            head = _head(file, kind)
            size = head["bytes"]
            if type(size) is not int or size > max_bytes or os.fstat(file.fileno()).st_size != file.tell() + size:
                return None
            data = np.fromfile(file, np.uint8, size).data
        return CheckedFile(head["about"], data) if zlib.crc32(data) == head["crc32"] else None
    except _UNREADABLE:
        return None


@contextmanager
def parsing_checked(path: Path, kind: str, what: str, *, max_bytes: float = math.inf) -> Iterator[CheckedFile]:
    """A file of `write_checked`, for a block that parses it.

    VerificationError, which says that it is not `what` (such as "a router"), if `read_checked` gives None, and for what
    the block raises at values that it does not expect.
    """
    stored = read_checked(path, kind, max_bytes=max_bytes)
    with parsing(f"{path} is not {what}", COPY_BUNDLE_AGAIN):
        if stored is None:
            raise ValueError("its checksum or length is wrong")
        yield stored


def read_about(path: Path, kind: str) -> Mapping[str, Any] | None:
    """The facts of a file, without reading its bytes; None if it is missing, of another kind or no regular file."""
    try:
        with open_regular(path, follows_links=False) as file:
            about: Mapping[str, Any] = _head(file, kind)["about"]
            return about
    except _UNREADABLE:
        return None


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError)


def _head(file: BinaryIO, kind: str) -> dict[str, Any]:
    """The first line; ValueError if it is not one of `write_checked`."""
    head: dict[str, Any] = json.loads(file.readline(_LONGEST_LINE))
    if head[kind] != VERSION or not isinstance(head["about"], dict):
        raise ValueError(f"it is not a file of kind {kind}")
    return head
