"""A real sshd on loopback, with its own keys, and an `ssh` that knows it."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_port
from waiting import wait_for

from edgetune.delivery.deploy.ssh import Connection

Answer = Callable[[str], Iterable[bytes]]

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
SetEnv PATH={folder}/board:{programs}:/usr/bin:/bin HOME={folder} {variables}
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
    """Kill all ssh clients of this process, of which there must be one, as when a connection is lost."""
    wait_for(lambda: bool(_clients()))
    for pid in _clients():
        os.kill(pid, signal.SIGKILL)


def _clients() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name == "ssh" and fields.split()[1] == str(os.getpid()):
                found.append(int(pid))
    return found


@contextmanager
def cut_in_the_middle(store: Path) -> Iterator[None]:
    """Kill the ssh clients of the block once the board has a part of a large file in `store`."""
    whole = Connection.converse

    def converse(self: Connection, command: Sequence[str], start: str, answer: Answer, *, limit_s: float) -> str:
        return whole(self, command, start, lambda text: cutting(answer(text)), limit_s=limit_s)

    def cutting(chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk
            # Not the last of its file, which may have got its name by now.
            if len(chunk) == 1 << 18:
                wait_for(lambda: any(part.stat().st_size for part in store.glob("*.part")))
                cut_ssh()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "converse", converse)
        yield


@contextmanager
def running(
    folder: Path, programs: str, *, enter: Sequence[str] = (), seen_as: str | None = None, variables: str = ""
) -> Iterator[Sshd]:
    """Start sshd with files in `folder`; commands on the board find their programs in `programs`, as in PATH.

    `enter` are the words before the command that start it in another system, which has the folder as `seen_as`, and
    `variables` what commands there get in addition, as in SetEnv.
    """
    if os.geteuid() == 0:
        # sshd refuses to start as root without this folder, which its systemd unit makes.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    inside = seen_as or str(folder)
    settings = _SERVER.format(port=port, folder=inside, programs=programs, variables=variables)
    (folder / "sshd_config").write_text(settings)
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    wrapper = folder / "programs/ssh"
    for path in (wrapper.parent, folder / "board"):
        path.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {SSH} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    server = "/usr/sbin/sshd" if enter else str(SSHD)
    with (folder / "log").open("wb") as log:
        command = [*enter, server, "-D", "-e", "-f", f"{inside}/sshd_config"]
        with subprocess.Popen(command, stderr=log) as process:
            try:
                _wait(port, process, folder / "log")
                yield Sshd(folder, port, wrapper.parent)
            finally:
                process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(log.read_text())
