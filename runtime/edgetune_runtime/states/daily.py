"""Bytes that calls write to a folder per day, counted in a file that outlives the process."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

from edgetune_runtime.formats.checked_file import read_about, write_checked

COUNT_NAME = "written-today"
_KIND = "edgetune_written"
_DAY_S = 86_400


class DailyBudget:
    """Allows about `budget` bytes per day (UTC) in a folder; several processes may share it. Thread-safe."""

    def __init__(self, folder: Path, budget: float) -> None:
        self._path, self._budget = folder / COUNT_NAME, budget
        self._lock = threading.Lock()

    def admits(self, size: int) -> bool:
        """Whether `size` more bytes may be written today."""
        return size <= self._budget and self._spent(_today()) + size <= self._budget

    def count(self, size: int) -> None:
        """Count bytes that are written; OSError if the file cannot be."""
        if math.isfinite(self._budget):
            with self._lock:
                about = {"day": _today(), "bytes": self._spent(_today()) + size}
                write_checked(self._path, _KIND, about, memoryview(b""))

    def _spent(self, today: int) -> int:
        about = read_about(self._path, _KIND) or {}
        spent = about.get("bytes")
        return spent if about.get("day") == today and isinstance(spent, int) else 0


def _today() -> int:
    return int(time.time() // _DAY_S)
