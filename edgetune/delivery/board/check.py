"""Facts of the board: processor, memory, disk, Python and clock; and what keeps a kit from being installed on it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.store.kit import Kit, version_key

_OLDEST_CLOCK = time.mktime((2025, 1, 1, 0, 0, 0, 0, 0, 0))
"""Before the first kit; a board without a battery for its clock starts in 1970."""
_MARGIN_MB = 20
# Bits of AT_HWCAP in Linux' arch/arm64/include/uapi/asm/hwcap.h, by the names in /proc/cpuinfo.
_AT_HWCAP = 16
_ARM_FEATURES = {0: "fp", 1: "asimd", 4: "pmull", 7: "crc32", 10: "asimdhp", 20: "asimddp", 22: "sve"}


@dataclass(frozen=True)
class MachineFacts:
    """What this machine has; memory and disk in MB (10^6 bytes).

    `bits` is that of the Python that runs this, as a 64-bit kernel may run a 32-bit system. `glibc` is empty with
    another C library. `disk_mb` is what is free where the prefix is, or would be.
    """

    machine: str
    bits: int
    instructions: tuple[str, ...]
    glibc: str
    python: str
    ram_mb: int
    available_mb: int
    disk_mb: int
    clock: str

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


def examine(prefix: Path) -> MachineFacts:
    """The facts of this machine, for a prefix that need not exist."""
    memory = _memory_mb()
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
    return MachineFacts(
        machine=machine,
        bits=struct.calcsize("P") * 8,
        instructions=_instructions(machine),
        glibc=_glibc(),
        python=".".join(map(str, sys.version_info[:2])),
        ram_mb=memory.get("MemTotal", 0),
        available_mb=memory.get("MemAvailable", 0),
        disk_mb=shutil.disk_usage(_existing(prefix)).free // 10**6,
        clock=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
    )


def problems(kit: Kit, facts: MachineFacts, *, disk_mb: int) -> Iterator[IncompatibleError]:
    """What keeps the kit from running on the board; `disk_mb` is what installing it will write."""
    if facts.bits != 64:
        yield IncompatibleError(f"this system has {facts.bits} bits, edgetune needs 64", "install a 64-bit system")
        return
    if facts.machine != kit.machine:
        remedy = "make a kit for this board: edgetune kit BUNDLE --board NAME"
        yield IncompatibleError(f"this machine is {facts.machine}, the kit is for {kit.machine} ({kit.board})", remedy)
        return
    missing = [name for name in kit.needs["instructions"] if name not in facts.instructions]
    if missing:
        remedy = "use a newer board, or install edgetune-runtime from its source"
        yield IncompatibleError(f"this processor lacks {', '.join(missing)}, which the kit's libraries need", remedy)
    if facts.python != kit.python:
        remedy = f"make the kit with --python {facts.python}, or install Python {kit.python}"
        yield IncompatibleError(
            f"this is Python {facts.python}, and the kit's wheels are for Python {kit.python}", remedy
        )
    if version_key(facts.glibc) < version_key(kit.needs["glibc"]):
        remedy = "use a newer system, such as Debian 12"
        yield IncompatibleError(
            f"glibc is {facts.glibc or 'missing'}, the kit's wheels need {kit.needs['glibc']}", remedy
        )
    if facts.ram_mb < kit.needs["ram_mb"]:
        remedy = "see what fits: edgetune devices fit BUNDLE --device NAME"
        yield IncompatibleError(
            f"the bundle needs at least {kit.needs['ram_mb']} MB of memory, this board has {facts.ram_mb} MB", remedy
        )
    if facts.disk_mb < disk_mb + _MARGIN_MB:
        remedy = "free some space, or choose another --prefix"
        yield IncompatibleError(
            f"the install needs {disk_mb + _MARGIN_MB} MB of disk, {facts.disk_mb} MB are free", remedy
        )
    if time.time() < _OLDEST_CLOCK:
        remedy = "set it: sudo date -s 'YYYY-MM-DD HH:MM'"
        yield IncompatibleError(f"the clock says {facts.clock}, so logs, keys and saved states get wrong times", remedy)


def require_fit(kit: Kit, prefix: Path, *, disk_mb: int) -> None:
    """IncompatibleError with the first problem of the kit on this machine."""
    for problem in problems(kit, examine(prefix), disk_mb=disk_mb):
        raise problem


def _memory_mb() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return {name: int(rest.split()[0]) * 1024 // 10**6 for name, _, rest in (line.partition(":") for line in lines)}


def _instructions(machine: str) -> tuple[str, ...]:
    """The instruction sets of the processor that this process may use, by the names in /proc/cpuinfo."""
    if machine == "aarch64":
        # Not /proc/cpuinfo: an emulator may show the host's.
        capabilities = _capabilities()
        return tuple(name for bit, name in _ARM_FEATURES.items() if capabilities >> bit & 1)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return tuple(line.partition(":")[2].split())
    return ()


def _capabilities() -> int:
    read = ctypes.CDLL(None).getauxval
    read.argtypes, read.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(read(_AT_HWCAP))


def _glibc() -> str:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:
        return ""
    return version if name == "glibc" else ""


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
