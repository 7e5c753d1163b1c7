"""Limits for processes of a benchmark: cgroups with limited memory or CPU time, which need root on Linux."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PARENT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cgroup:
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

    def started_in(self, command: Sequence[str]) -> list[str]:
        """The command, started within the cgroup."""
        return ["sh", "-c", f'echo $$ > {self.procs} && exec "$@"', "sh", *command]


@contextmanager
def memory_limit(limit_mb: float) -> Iterator[Cgroup]:
    """A cgroup that may use so much memory (10^6 bytes) and no swap; it is removed once its processes have ended."""
    limit = str(round(limit_mb * 1e6))
    version_1 = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    with _cgroup("memory", version_1, {"memory.max": limit, "memory.swap.max": "0"}) as cgroup:
        yield cgroup


@contextmanager
def cpu_quota(cores: float) -> Iterator[Cgroup]:
    """A cgroup that may use so many cores."""
    quota_us = str(round(cores * 100_000))
    with _cgroup("cpu", {"cpu.cfs_quota_us": quota_us}, {"cpu.max": f"{quota_us} 100000"}) as cgroup:
        yield cgroup


@contextmanager
def _cgroup(controller: str, version_1: Mapping[str, str], version_2: Mapping[str, str]) -> Iterator[Cgroup]:
    is_version_1 = (_PARENT / controller).is_dir()
    parent = _PARENT / controller if is_version_1 else _PARENT
    cgroup = Cgroup(parent / f"edgetune-{os.getpid()}-{time.monotonic_ns()}")
    cgroup.folder.mkdir()
    try:
        for name, value in (version_1 if is_version_1 else version_2).items():
            # A kernel that does not count swap has no file for it.
            if "sw" not in name or (cgroup.folder / name).exists():
                (cgroup.folder / name).write_text(value)
        yield cgroup
    finally:
        # The kernel takes a moment to forget processes that have ended.
        time.sleep(0.2)
        cgroup.folder.rmdir()
