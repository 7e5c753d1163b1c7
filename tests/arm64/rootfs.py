"""An arm64 Debian for tests: packages that mmdebstrap unpacks once, without setting them up, into the cache folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs

SUITE = "trixie"
"""Debian 13, the system of Raspberry Pi OS, with Python 3.13."""
PACKAGES = (
    "base-files", "base-passwd", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "libstdc++6",
    "openssh-server", "python3", "python3-venv", "sed", "tar", "util-linux",
)  # fmt: skip
VERSION = 2
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
    lacking = [] if os.geteuid() == 0 else ["root's rights, for chroot: run it with sudo"]
    packages = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    return lacking + ([f"Debian's packages: apt install {' '.join(packages)}"] if packages else [])


def prepare() -> Path:
    """The folder of the system; made at the first call, which needs the network for seconds."""
    _register_qemu()
    root = Path(platformdirs.user_cache_dir("edgetune")) / "arm64" / f"{SUITE}-{VERSION}"
    if not root.is_dir():
        partial = root.with_name(f"{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        # Nothing of a package runs, so that nothing is emulated.
        command = ["mmdebstrap", "--variant=extract", "--architectures=arm64", f"--include={','.join(PACKAGES)}"]
        subprocess.run([*command, SUITE, str(partial)], check=True, stdout=sys.stderr)
        for name in ("passwd", "group"):
            shutil.copy(partial / f"usr/share/base-passwd/{name}.master", partial / f"etc/{name}")
        with (partial / "etc/passwd").open("a", encoding="utf-8") as users:
            users.write("sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n")
        for folder in ("mnt", "root"):
            (partial / folder).mkdir(exist_ok=True)
        partial.rename(root)
    return root


def _register_qemu() -> None:
    """Have the kernel run aarch64 programs under qemu."""
    if not (_BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True)
    if not (_BINFMT / "qemu-aarch64").exists():
        (_BINFMT / "register").write_text(_QEMU.read_text(encoding="utf-8"), encoding="utf-8")
