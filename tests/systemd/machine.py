"""A Debian that systemd-nspawn boots with systemd as its first process, for tests of units. It needs root."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from debian import cached, lacking

PACKAGES = (
    "dbus", "dbus-user-session", "libpam-systemd", "libstdc++6", "passwd", "python3", "python3-venv", "systemd",
    "systemd-sysv",
)  # fmt: skip
VERSION = 1
"""A change of the suite or of the packages needs the next one."""
SHARED = "/mnt"
"""Where the machine sees the folder of the test."""
USER = "pi"
_PROGRAMS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
_BOOT_S = 120


def missing() -> list[str]:
    """What this computer lacks to boot a Debian, one line each; empty if it lacks nothing."""
    if sys.platform != "linux":
        return [f"Linux; this is {sys.platform}"]
    return lacking(_PROGRAMS)


def prepare() -> Path:
    """The folder of the system; made at the first call, which takes a minute and needs the network."""
    user = f'--customize-hook=chroot "$1" useradd --create-home {USER}'
    return cached("systemd", VERSION, PACKAGES, "--variant=apt", user)


@dataclass(frozen=True)
class Machine:
    """A booted system: the process number of its systemd, and the folder that it sees as /mnt."""

    init: int
    shared: Path

    def run(self, *command: str, user: str | None = None, check: bool = True) -> str:
        """Run a program in the system, as root or as a user with a session; its standard output.

        AssertionError if it fails and `check`.
        """
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]
        variables = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        if user is not None:
            variables = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *variables]
            variables += [f"HOME=/home/{user}", f"XDG_RUNTIME_DIR=/run/user/{self._uid(user)}"]
        done = subprocess.run([*enter, *variables, *command], capture_output=True, text=True, check=False, timeout=600)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _uid(self, user: str) -> str:
        return self.run("id", "-u", user)


@contextmanager
def booted(root: Path, shared: Path) -> Iterator[Machine]:
    """Boot a copy of the system that is thrown away afterwards, without a network."""
    command = ["systemd-nspawn", f"--directory={root}", "--volatile=overlay", "--register=no", "--keep-unit", "--boot"]
    command += ["--private-network", f"--bind={shared}:{SHARED}", "--console=pipe", "--machine=edgetune-test"]
    with (shared / "boot.log").open("w", encoding="utf-8") as log:
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        init = _child(nspawn)
        assert init is not None, (shared / "boot.log").read_text(encoding="utf-8", errors="replace")
        machine = Machine(init, shared)
        end = time.monotonic() + _BOOT_S
        # "degraded" if a unit that does not matter here failed.
        while machine.run("systemctl", "is-system-running", check=False) not in {"running", "degraded"}:
            assert time.monotonic() < end, (shared / "boot.log").read_text(encoding="utf-8", errors="replace")
            time.sleep(0.5)
        yield machine
    finally:
        nspawn.terminate()
        try:
            nspawn.wait(30)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


def _child(nspawn: subprocess.Popen[bytes]) -> int | None:
    """The process number of systemd-nspawn's child, the system's first process; None if it did not boot."""
    end = time.monotonic() + _BOOT_S
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    while time.monotonic() < end and nspawn.poll() is None:
        for child in children.read_text().split():
            if "systemd" in Path(f"/proc/{child}/comm").read_text():
                return int(child)
        time.sleep(0.2)
    return None
