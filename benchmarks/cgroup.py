"""A memory limit for processes of a benchmark: a cgroup without swap, which needs root on Linux."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PARENT = Path("/sys/fs/cgroup")
_VERSION_1 = _PARENT / "memory"


@dataclass(frozen=True)
class MemoryLimit:
    """A cgroup; a process joins it by writing its number to `procs`."""

    folder: Path

    @property
    def procs(self) -> Path:
        """The file of its processes."""
        return self.folder / "cgroup.procs"

    @property
    def peak_mb(self) -> float | None:
        """The most memory that its processes used together, cached file pages included; None if it is not known."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with suppress(OSError, ValueError):
                return int((self.folder / name).read_text()) / 1e6
        return None

    @property
    def kills(self) -> int:
        """How many processes the kernel killed because of the limit."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                lines = (self.folder / name).read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        return 0


@contextmanager
def memory_limit(limit_mb: float) -> Iterator[MemoryLimit]:
    """A cgroup that may use so much memory (10^6 bytes) and no swap; it is removed once its processes have ended."""
    parent = _VERSION_1 if _VERSION_1.is_dir() else _PARENT
    found = MemoryLimit(parent / f"edgetune-{os.getpid()}-{time.monotonic_ns()}")
    found.folder.mkdir()
    names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if parent == _VERSION_1 else ["memory.max"]
    try:
        for name in names:
            with suppress(FileNotFoundError):
                (found.folder / name).write_text(str(round(limit_mb * 1e6)))
        with suppress(OSError):
            (found.folder / "memory.swap.max").write_text("0")
        yield found
    finally:
        found.folder.rmdir()
