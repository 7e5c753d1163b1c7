"""An arm64 Debian for tests: packages that mmdebstrap unpacks once, without setting them up, into the cache folder."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from debian import cached, lacking

PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "libstdc++6",
    "openssh-server", "python3", "python3-venv", "sed", "tar", "util-linux",
)  # fmt: skip
VERSION = 3
"""A change of the suite or of the packages needs the next one."""

_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "unshare": "util-linux",
    "ip": "iproute2",
}
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_QEMU = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")


def missing() -> list[str]:
    """What this machine lacks for an emulated board, one line each; empty if it lacks nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return [f"an x86-64 machine under Linux; this is {platform.machine()} under {sys.platform}"]
    return lacking(_PROGRAMS)


def prepare() -> Path:
    """The folder of the system; made at the first call, which needs the network for seconds."""
    _register_qemu()
    # Nothing of a package runs, so that nothing is emulated.
    return cached("arm64", VERSION, PACKAGES, "--variant=extract", "--architectures=arm64", finish=_set_up)


def _set_up(root: Path) -> None:
    """What the packages would do for users and folders if they ran."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    with (root / "etc/passwd").open("a", encoding="utf-8") as users:
        users.write("sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
    for folder in ("mnt", "root"):
        (root / folder).mkdir(exist_ok=True)


def _register_qemu() -> None:
    """Have the kernel run aarch64 programs under qemu."""
    if not (_BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True)
    if not (_BINFMT / "qemu-aarch64").exists():
        (_BINFMT / "register").write_text(_QEMU.read_text(encoding="utf-8"), encoding="utf-8")
