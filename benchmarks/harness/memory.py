"""Resident memory of processes on Linux, in MB (10^6 bytes)."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    pids = [pid]
    for member in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{member}/task").iterdir():
                pids += map(int, (thread / "children").read_text().split())
    return pids


def status_mb(pid: int, key: str) -> float:
    """A figure of a process: VmRSS, VmHWM (its peak) or RssAnon (without mapped files); 0 if it has ended."""
    return _figure_mb(Path(f"/proc/{pid}/status"), key)


def family_mb(pid: int) -> float:
    """Resident memory of the process and its descendants, each with its part of what they share."""
    own = _command(pid)
    # Until it starts a program, a child can have the memory of its parent itself (vfork), which counts once.
    others = [member for member in family(pid) if member != pid and _command(member) != own]
    return sum(_figure_mb(Path(f"/proc/{member}/smaps_rollup"), "Pss") for member in (pid, *others))


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _figure_mb(file: Path, key: str) -> float:
    with suppress(OSError):
        if match := re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE):
            return int(match[1]) * 1024 / 1e6
    return 0.0
