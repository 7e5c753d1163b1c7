"""What this process may use of the machine: cores and memory, as affinity, cgroups and kinds of core leave them.

Files are those of Linux; elsewhere, and where one is missing, the limit that it would tell is taken as none. `root` is
the folder that /proc and /sys are in.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)

ROOT = Path("/")
MOST_THREADS = 8
"""Threads beyond these cost more in waiting for each other than they give."""

_LOOKS, _LOOK_S = 10, 0.01
_THROTTLED = {
    0x1: "too little voltage",
    0x2: "the clock is capped",
    0x4: "throttled",
    0x8: "throttled by heat",
}
"""Flags of Raspberry Pi firmware: https://www.raspberrypi.com/documentation/computers/os.html#get_throttled"""
_PERFORMANCE = 0.75
"""Cores of at least this share of the fastest one's capacity count: a step waits for its slowest thread."""


def usable_cores(root: Path = ROOT) -> int:
    """Threads to compute with by default: performance cores of this process' affinity, within its cgroups' quota.

    At least 1 and at most 8; a quota of 1.5 cores gives one thread, as a second would be stopped half of the time.
    """
    fast = len(_performance_cores(_affinity(), root))
    return min(fast, cores_left(root), MOST_THREADS)


def cores_left(root: Path = ROOT) -> int:
    """Cores that this process may use now, by its affinity and its cgroups' quota; at least 1."""
    cores, quota = len(_affinity()), cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def threads_for(wanted: int | None) -> int:
    """The threads of an engine that keeps them: those that are wanted, as far as there are cores for them now."""
    if wanted is None:
        return usable_cores()
    left = cores_left()
    if wanted > left:
        _LOG.warning("threads=%d where %d cores may be used: computing with %d", wanted, left, left)
    return min(wanted, left)


def others_running(root: Path = ROOT) -> int | None:
    """Threads of the whole machine that compute or wait for a core at this moment, but for the one that asks.

    None where the system does not tell. This process' own threads count, if they are not idle.
    """
    found = re.match(r"\S+ \S+ \S+ (\d+)/", _read(root / "proc/loadavg"))
    return max(0, int(found[1]) - 1) if found else None


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
        # From memory.high on (MemoryHigh of a systemd unit) the kernel slows the process down to reclaim memory.
        found = [_number(_read(folder / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((number for number in found if number is not None), default=None)
        used = _number(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # Pages of files count as used, and go when memory is needed.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            free.append(max(0.0, limit - used + (int(cached[1]) if cached else 0)) / 1e6)
    return min(free, default=None)


def throttling(root: Path = ROOT) -> str | None:
    """Why the processor runs slower than it could, as far as the board tells: heat or too little voltage; else None."""
    flags = _read(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    bits = int(flags, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", flags) else 0
    return ", ".join(text for bit, text in _THROTTLED.items() if bits & bit) or None


def disturbance(root: Path = ROOT) -> str | None:
    """What would spoil a measurement now, in one line: threads of others, or a throttled processor; else None.

    Looks for a tenth of a second, in which this process must not compute.
    """
    looks = []
    for _ in range(_LOOKS):
        looks.append(others_running(root) or 0)
        time.sleep(_LOOK_S)
    running = sorted(looks)[_LOOKS // 2]
    threads = f"{running} other thread{'s' if running > 1 else ''} compute on {os.cpu_count() or 1} cores"
    found = [threads if running else None, throttling(root)]
    return "; ".join(reason for reason in found if reason) or None


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
