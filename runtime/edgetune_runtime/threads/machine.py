"""The processor, cores and memory of this machine, and what this process may use: affinity, cgroups, core types.

Read from /proc and /sys of Linux, in the folder `root`. Where a file is missing, and on other systems, no limit is
assumed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
MAX_THREADS = 8
"""More threads than this lose more in synchronization than they gain."""

_SAMPLES, _SAMPLE_S = 10, 0.01
_FLAGS, _FORKED = 6, 0x40
"""The place of a process' flags in /proc/self/stat, after its name, and the one of a fork: see proc_pid_stat(5)."""
_THROTTLED = {
    0x1: "too little voltage",
    0x2: "the clock is capped",
    0x4: "throttled",
    0x8: "throttled by heat",
}
"""Flags of Raspberry Pi firmware: https://www.raspberrypi.com/documentation/computers/os.html#get_throttled"""
_PERFORMANCE = 0.75
"""Cores slower than this share of the fastest core's capacity are not used: a step waits for its slowest thread."""
_INSTRUCTIONS = {
    "asimd": "neon",
    "crc32": "crc32",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
    "sse4_2": "sse4.2",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx-vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
}
"""Names in /proc/cpuinfo, and those in the files of boards: what the engines have faster code for."""


def usable_cores(root: Path = ROOT) -> int:
    """The default number of compute threads: the performance cores that affinity and cgroup quota allow.

    At least 1 and at most 8. A quota of 1.5 cores gives one thread, as a second one would be stopped half of the time.
    """
    fast = len(_performance_cores(_affinity(), root))
    return min(fast, cores_left(root), MAX_THREADS)


def cores_left(root: Path = ROOT) -> int:
    """The number of cores that affinity and cgroup quota allow now; at least 1."""
    cores, quota = len(_affinity()), cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def threads_for(threads: int | None, root: Path = ROOT) -> int:
    """`threads`, limited to the available cores; None for the default."""
    return usable_cores(root) if threads is None else min(threads, cores_left(root))


def others_running(root: Path = ROOT) -> int | None:
    """The number of other threads on the machine that are running or waiting for a core now.

    None if the system does not report it. Includes this process's other threads if they are not idle.
    """
    match = re.match(r"\S+ \S+ \S+ (\d+)/", read_text(root / "proc/loadavg"))
    return max(0, int(match[1]) - 1) if match else None


def cpu_quota(root: Path = ROOT) -> float | None:
    """The CPU quota of this process's cgroups, in cores; None without a quota."""
    quotas = []
    for folder in _cgroups("cpu", root):
        words = read_text(folder / "cpu.max").split()
        if not words:
            words = [read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (_number(word) for word in (*words, "", "")[:2])
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def was_forked(root: Path = ROOT) -> bool:
    """Whether this process is a fork that runs its parent's program (PF_FORKNOEXEC of Linux's sched.h)."""
    # The name of the process comes before, and may have any signs.
    fields = read_text(root / "proc/self/stat").rpartition(")")[2].split()
    return len(fields) > _FLAGS and bool(int(fields[_FLAGS]) & _FORKED)


def resident_mb() -> float | None:
    """Resident memory of this process in 10^6 bytes; outside Linux the peak, on Windows None."""
    return _status_mb("VmRSS") or peak_mb()


def peak_mb() -> float | None:
    """Peak resident memory of this process in 10^6 bytes; None on Windows."""
    # On Linux, ru_maxrss is that of the parent if it was larger when it started this process.
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource  # noqa: PLC0415 - missing on Windows
    except ImportError:
        return None
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def own_mb() -> float:
    """Resident memory of this process that is not of mapped files, in 10^6 bytes; 0 outside Linux."""
    return _status_mb("RssAnon") or 0.0


def _status_mb(key: str) -> float | None:
    """A size of this process in /proc, in 10^6 bytes; None outside Linux."""
    match = re.search(rf"^{key}:\s+(\d+) kB", read_text(Path("/proc/self/status")), re.MULTILINE)
    return int(match[1]) * 1024 / 1e6 if match else None


def free_mb(root: Path = ROOT) -> float | None:
    """Memory that this process can still allocate, in 10^6 bytes: free memory within its cgroups' limits.

    None if the system does not report it.
    """
    lines = read_text(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("MemAvailable")]
    for folder in _cgroups("memory", root):
        # Above memory.high (MemoryHigh of a systemd unit) the kernel slows the process down to reclaim memory.
        limits = [_number(read_text(folder / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((number for number in limits if number is not None), default=None)
        used = _number(read_text(folder / "memory.current") or read_text(folder / "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # Cached file pages count as used, but are reclaimed when memory is needed.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
            free.append(max(0.0, limit - used + (int(cached[1]) if cached else 0)) / 1e6)
    return min(free, default=None)


def processor(root: Path = ROOT) -> str:
    """The processor's name; on ARM boards, which report none, the name of the board."""
    lines = read_text(root / "proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "model\t"))]
    named = next((name for name in names if not name.isdigit()), "")
    is_arm = platform.machine() in ("aarch64", "arm64")
    return f"{'ARM, ' if is_arm else ''}{named or platform.processor() or platform.machine()}"


def instructions(root: Path = ROOT) -> list[str]:
    """The instruction sets of the processor that the engines have faster code for; empty if it does not report any."""
    lines = read_text(root / "proc/cpuinfo").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return [name for flag, name in _INSTRUCTIONS.items() if flag in flags]


def memory(root: Path = ROOT) -> dict[str, float]:
    """Total memory and swap, total and used, in MB (10^6 bytes); empty if the system does not report it."""
    sizes = re.findall(r"^(MemTotal|SwapTotal|SwapFree): +(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    mb = {name: int(kib) * 1024 / 1e6 for name, kib in sizes}
    if "MemTotal" not in mb:
        return {}
    swap = mb.get("SwapTotal", 0.0)
    return {"total_mb": mb["MemTotal"], "swap_mb": swap, "swap_used_mb": swap - mb.get("SwapFree", 0.0)}


def throttling(root: Path = ROOT, *, since_start: bool = False) -> str | None:
    """Why the board throttles its processor (heat or low voltage), or did since its start; None if it does not.

    None too where the board does not report it.
    """
    flags = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled") or _vcgencmd_throttled(root)
    # Flags of Raspberry Pi firmware, written in hexadecimal.
    bits = int(flags, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", flags) else 0
    # The flags of what happened since the start are the same, 16 bits further up.
    bits >>= 16 if since_start else 0
    return ", ".join(text for bit, text in _THROTTLED.items() if bits & bit) or None


def _vcgencmd_throttled(root: Path) -> str:
    """The flags that the firmware's own program prints; empty without it."""
    program = shutil.which("vcgencmd")
    if root != ROOT or program is None:
        return ""
    try:
        process = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip().removeprefix("throttled=")


def disturbance(root: Path = ROOT) -> str | None:
    """What would distort a measurement now, in one line: other running threads, or throttling; None if nothing.

    Samples for a tenth of a second, during which this process must not compute.
    """
    samples = []
    for _ in range(_SAMPLES):
        samples.append(others_running(root) or 0)
        time.sleep(_SAMPLE_S)
    running = sorted(samples)[_SAMPLES // 2]
    threads = f"{running} other running thread{'s' if running > 1 else ''} on {os.cpu_count() or 1} cores"
    reasons = [threads if running else None, throttling(root)]
    return "; ".join(reason for reason in reasons if reason) or None


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _performance_cores(cores: set[int], root: Path) -> set[int]:
    """The cores that are not much slower than the fastest one."""
    folder = root / "sys/devices/system/cpu"
    capacity = {core: _number(read_text(folder / f"cpu{core}/cpu_capacity")) for core in cores}
    if None in capacity.values():
        fast = _core_list(read_text(root / "sys/devices/cpu_core/cpus")) & cores
        return fast or cores
    highest = max(value or 0 for value in capacity.values())
    return {core for core, value in capacity.items() if (value or 0) >= _PERFORMANCE * highest}


def _core_list(text: str) -> set[int]:
    """Parse a list of cores such as 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return {core for first, *last in ranges for core in range(int(first), int((last or [first])[0]) + 1)}


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups with this controller, up to the root of each hierarchy."""
    mount = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        tops = [mount / names, mount / controller] if names else [mount, mount / "unified"]
        if names and controller not in names.split(","):
            continue
        for top in tops:
            folder = top / path.lstrip("/")
            # In a container the path may be the host's; then only the top folder exists.
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def read_text(path: Path) -> str:
    """The text of a file of /proc or /sys without blanks around it; empty if the system does not have the file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.lstrip("-").isdigit() else None
