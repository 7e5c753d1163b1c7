"""A real sshd on loopback, with its own keys, and an `ssh` that knows it."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SSH = shutil.which("ssh")
needs_sshd = pytest.mark.skipif(
    SSHD is None or SSH is None, reason="sshd is not installed; Debian: apt install openssh-server"
)
# The board's Python is the one of the tests, whatever the system and the user's shell have.
_SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv PATH={folder}/board:{programs}:/usr/bin:/bin HOME={folder}
"""
_CLIENT = """\
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
"""


@dataclass(frozen=True)
class Sshd:
    """A running sshd. `programs` is a folder with the `ssh` that uses the keys here, to put first in PATH."""

    folder: Path
    port: int
    programs: Path

    @property
    def target(self) -> str:
        """USER@HOST:PORT."""
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def board_programs(self) -> Path:
        """Commands on the board find the programs here first."""
        return self.folder / "board"

    @property
    def known_hosts(self) -> Path:
        """The file that ssh compares host keys with."""
        return self.folder / "known_hosts"

    def public_key(self, name: str) -> str:
        """Type and key of `host`, the one that sshd has, or of `other`."""
        return " ".join((self.folder / f"{name}.pub").read_text(encoding="utf-8").split()[:2])

    def trust(self, key: str) -> None:
        """Take `key` for the one of this host."""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key}\n", encoding="utf-8")


def cut_ssh() -> None:
    """Kill all ssh clients of this process, as when a connection is lost."""
    for file in Path("/proc/self/task").glob("*/children"):
        for pid in file.read_text(encoding="ascii").split():
            if Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() == "ssh":
                os.kill(int(pid), signal.SIGKILL)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def running(folder: Path, board_programs: Path) -> Iterator[Sshd]:
    """Start sshd with files in `folder`; commands on the board find those in `board_programs`."""
    if os.geteuid() == 0:
        # sshd refuses to start as root without this folder, which its systemd unit makes.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    (folder / "sshd_config").write_text(_SERVER.format(port=port, folder=folder, programs=board_programs))
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    programs = folder / "programs"
    programs.mkdir()
    (folder / "board").mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {SSH} -F {folder}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    log = (folder / "log").open("wb")
    with log, subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log) as process:
        try:
            _wait(port, process, folder / "log")
            yield Sshd(folder, port, programs)
        finally:
            process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(log.read_text())
