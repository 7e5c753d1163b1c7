"""Read and write the files of saved states, which are checked by length and CRC-32.

A file is one line of JSON with the state's description, length and CRC-32, followed by the state's bytes.
"""

from __future__ import annotations

import json
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
class StateFile:
    """The description of a state, and the state."""

    about: Mapping[str, Any]
    state: memoryview


def write_state(path: Path, about: Mapping[str, Any], state: memoryview) -> None:
    """Write a file atomically; OutOfSpaceError on a full disk, OSError when it cannot be written."""
    head = {"edgetune_state": VERSION, "bytes": len(state), "crc32": zlib.crc32(state), "about": about}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        file.write(state)


def read_state(path: Path) -> StateFile | None:
    """Read what `write_state` wrote; None if the file is missing, damaged or of another kind."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(_LONGEST_LINE))
            if head["edgetune_state"] != VERSION or path.stat().st_size != file.tell() + head["bytes"]:
                return None
            state = np.fromfile(file, np.uint8, head["bytes"]).data
        return StateFile(head["about"], state) if zlib.crc32(state) == head["crc32"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_about(path: Path) -> Mapping[str, Any] | None:
    """The description of the state in a file, without reading the state; None for a file of another kind."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(_LONGEST_LINE))
        about: Mapping[str, Any] = head["about"]
        return about if isinstance(about, dict) and head["edgetune_state"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
