"""What this process may use of the machine: cores and memory, as affinity, cgroups and kinds of core leave them.

Files are those of Linux; elsewhere, and where one is missing, the limit that it would tell is taken as none. `root` is
the folder that /proc and /sys are in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
MOST_THREADS = 8
"""Threads beyond these cost more in waiting for each other than they give."""

_PERFORMANCE = 0.75
"""Cores of at least this share of the fastest one's capacity count: a step waits for its slowest thread."""


def usable_cores(root: Path = ROOT) -> int:
    """Threads that can compute side by side: performance cores of this process' affinity, within its cgroups' quota.

    At least 1 and at most 8; a quota of 1.5 cores gives one thread, as a second would be stopped half of the time.
    """
    cores = _performance_cores(_affinity(), root)
    quota = cpu_quota(root)
    within = len(cores) if quota is None else min(len(cores), int(quota))
    return max(1, min(within, MOST_THREADS))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the cgroups of this process leave it; None without a limit."""
    quotas = []
    for folder in _cgroups("cpu", root):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (_number(word) for word in (*words, "", "")[:2])
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def free_mb(root: Path = ROOT) -> float | None:
    """Memory that this process can still take, in 10^6 bytes: what is free, within its cgroups' limits.

    None where the system does not tell.
    """
    lines = _read(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("MemAvailable")]
    for folder in _cgroups("memory", root):
        limit = _number(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
        used = _number(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # Pages of files count as used, and go when memory is needed.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            free.append(max(0.0, limit - used + (int(cached[1]) if cached else 0)) / 1e6)
    return min(free, default=None)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _performance_cores(cores: set[int], root: Path) -> set[int]:
    """Those of the cores that are not much slower than the fastest of them."""
    folder = root / "sys/devices/system/cpu"
    capacity = {core: _number(_read(folder / f"cpu{core}/cpu_capacity")) for core in cores}
    if None in capacity.values():
        fast = _core_list(_read(root / "sys/devices/cpu_core/cpus")) & cores
        return fast or cores
    most = max(value or 0 for value in capacity.values())
    return {core for core, value in capacity.items() if (value or 0) >= _PERFORMANCE * most}


def _core_list(text: str) -> set[int]:
    """The cores of a list such as 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return {core for first, *last in ranges for core in range(int(first), int((last or [first])[0]) + 1)}


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process' cgroups that have the controller, up to the root of each hierarchy."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        tops = [mount / names, mount / controller] if names else [mount, mount / "unified"]
        if names and controller not in names.split(","):
            continue
        for top in tops:
            folder = top / path.lstrip("/")
            # In a container the path may be the host's, and only the top is there.
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.lstrip("-").isdigit() else None
