"""Files with a checksum: a line of JSON with kind, version, facts, length and CRC-32, then the bytes.

Reading returns None for a file that is damaged or of another kind.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune_runtime.atomic import replacing

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
        file.write(json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        file.write(data)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_checked(path: Path, kind: str) -> CheckedFile | None:
    """Read a file of `write_checked`; None if it is missing, damaged or of another kind."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(_LONGEST_LINE))
            if head[kind] != VERSION or path.stat().st_size != file.tell() + head["bytes"]:
                return None
            data = np.fromfile(file, np.uint8, head["bytes"]).data
        return CheckedFile(head["about"], data) if zlib.crc32(data) == head["crc32"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_about(path: Path, kind: str) -> Mapping[str, Any] | None:
    """The facts of a file, without reading its bytes; None if it is missing or of another kind."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(_LONGEST_LINE))
        about: Mapping[str, Any] = head["about"]
        return about if isinstance(about, dict) and head[kind] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
