"""The Python of a board that a kit is for, and what pip and environment markers call its machine and version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from edgetune_devices.boards import Board
from edgetune_runtime.errors import IncompatibleError, UsageError
from packaging.tags import Tag, compatible_tags, cpython_tags

from edgetune.delivery.wheel.platforms import GLIBC, OLDEST_PYTHON, SYSTEM_PYTHON

_OLDEST_GLIBC_MINOR = 17
# Every 64-bit ARM processor has the first; numpy's wheels for x86-64 need the second (x86-64-v2).
_INSTRUCTIONS = {
    "aarch64": ("asimd", "fp"),
    "x86_64": ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"),
}


@dataclass(frozen=True)
class TargetPython:
    """A machine as `uname -m` names it, and a Python version such as 3.13."""

    machine: str
    python: str

    @property
    def platform(self) -> str:
        """The platform's name, such as linux-aarch64."""
        return f"linux-{self.machine}"

    @property
    def instructions(self) -> tuple[str, ...]:
        """What the kit's libraries need of the processor, by the names in /proc/cpuinfo."""
        return _INSTRUCTIONS[self.machine]

    def pip_options(self) -> Iterator[str]:
        """The options that make pip download wheels for this platform.

        All manylinux tags are named: pip does not know that one implies the older ones, and with too few of them it
        silently takes an older release.
        """
        yield from ("--only-binary", ":all:", "--implementation", "cp", "--python-version", self.python)
        for abi in (f"cp{self.python.replace('.', '')}", "abi3", "none"):
            yield from ("--abi", abi)
        tags = [f"manylinux_2_{minor}" for minor in range(GLIBC[1], _OLDEST_GLIBC_MINOR - 1, -1)]
        for tag in (*tags, "manylinux2014"):
            yield from ("--platform", f"{tag}_{self.machine}")

    def runs(self, tag: Tag) -> bool:
        """Whether a wheel with this tag runs here, with whatever glibc: a kit's need of it is checked on the board."""
        if not re.fullmatch(rf"any|(manylinux\w*|linux)_{self.machine}", tag.platform):
            return False
        interpreter, version = f"cp{self.python.replace('.', '')}", tuple(map(int, self.python.split(".")))
        cpython = cpython_tags(version, [interpreter], [tag.platform])
        return tag in {*cpython, *compatible_tags(version, interpreter, [tag.platform])}

    def markers(self) -> dict[str, str]:
        """The values of environment markers on the board."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


def target_python(board: Board, python: str) -> TargetPython:
    """The Python of a board in the version `python`.

    UsageError for a version that is too old, IncompatibleError for a board without Linux.
    """
    if board.system != "linux":
        message = f"{board.name} runs {board.system}, and kits are for Linux"
        raise IncompatibleError(message, "choose another --board; on this one, install edgetune-runtime with pip")
    is_x86 = any(name.startswith("x86-64") for name in board.instruction_sets)
    if not re.fullmatch(r"3\.\d{1,2}", python):
        raise UsageError(f"--python {python!r} is not a version", f"write one such as {SYSTEM_PYTHON}")
    if tuple(map(int, python.split("."))) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise UsageError(f"--python {python}: edgetune-runtime needs Python {oldest} or newer", f"use {SYSTEM_PYTHON}")
    return TargetPython("x86_64" if is_x86 else "aarch64", python)
