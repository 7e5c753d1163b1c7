"""Resident memory of processes on Linux, in MB (10^6 bytes)."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for member in found:
        with suppress(OSError):
            for thread in Path(f"/proc/{member}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def status_mb(pid: int, key: str) -> float:
    """A figure of a process: VmRSS, VmHWM (its peak) or RssAnon (without mapped files); 0 if it has ended."""
    return _figure_mb(Path(f"/proc/{pid}/status"), key)


def proportional_mb(pid: int) -> float:
    """Resident memory with a share of what it shares: a child shares all with its parent until it starts a program."""
    return _figure_mb(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _figure_mb(file: Path, key: str) -> float:
    with suppress(OSError):
        if match := re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE):
            return int(match[1]) * 1024 / 1e6
    return 0.0
