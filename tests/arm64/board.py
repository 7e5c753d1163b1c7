"""An emulated board: runs programs in the arm64 system as one of ARM's processors, without a network."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

SHARED = "/mnt"
"""Where the board sees the folder of the test."""
_ENTER = """
root=$1 shared=$2 && shift 2
mount -t proc proc "$root/proc" && mount --bind "$shared" "$root/mnt" || exit
mount -t tmpfs tmpfs "$root/run" && mkdir "$root/run/sshd" && exec chroot "$root" "$@"
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Board:
    """`root` is the system and is not changed; the board sees the folder `shared` as /mnt, and has its home there."""

    root: Path
    shared: Path

    def run(self, *command: str, cpu: str, timeout_s: float = 1800) -> str:
        """Run a program as the processor `cpu` of qemu, and return its standard output.

        AssertionError if it fails; an illegal instruction is named.
        """
        # No network to reach.
        enter = ["unshare", "--net", *self.entering(cpu), *command]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=timeout_s, check=False)
        illegal = done.returncode in (-signal.SIGILL, 128 + signal.SIGILL)
        reason = "an illegal instruction" if illegal else f"exit code {done.returncode}"
        assert done.returncode == 0, f"{reason} of {' '.join(command)} on {cpu}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def entering(self, cpu: str) -> list[str]:
        """The words before a command that run it on the board; its mounts end with the command."""
        enter = ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self.root), str(self.shared)]
        variables = [f"PATH={_PATH}", f"HOME={SHARED}", "LANG=C.UTF-8", f"QEMU_CPU={cpu}"]
        return ["env", "-i", *variables, *enter]
