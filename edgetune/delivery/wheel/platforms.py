"""The platforms that wheels are made for: C library, Python, and what the compiler and pip call them."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import suggestion

GLIBC = (2, 36)
"""The C library of Debian 12 and of the Raspberry Pi OS on it; newer systems run what was built for it."""

SYSTEM_PYTHON = "3.13"
"""The Python of Raspberry Pi OS that is based on Debian 13; older systems have 3.11."""
OLDEST_PYTHON = (3, 11)
"""The oldest that edgetune-runtime supports."""


@dataclass(frozen=True)
class Platform:
    """A processor architecture under Linux; `processor` is its name in CMake, zig and wheels' file names."""

    name: str
    processor: str

    @property
    def target(self) -> str:
        """The target of `zig cc`."""
        return f"{self.processor}-linux-gnu.{'.'.join(map(str, GLIBC))}"

    @property
    def tag(self) -> str:
        """The compatibility tag of the wheel: any Python 3 on a system with this C library or a newer one."""
        return f"py3-none-manylinux_{'_'.join(map(str, GLIBC))}_{self.processor}"


PLATFORMS = {f"linux-{name}": Platform(f"linux-{name}", name) for name in ("aarch64", "x86_64")}


def platform_of(name: str) -> Platform:
    """The platform of this name; UsageError when there is none."""
    try:
        return PLATFORMS[name]
    except KeyError:
        raise UsageError(f"no platform {name!r}", suggestion(name, list(PLATFORMS))) from None
