"""Stand-ins for a board: an sshd, and systemctl, which starts the command of the unit's file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from edgetune_runtime.store import service, sockets
from kits import SYSTEMCTL, KitMaker, copied, run, write_bundle
from ports import free_port
from repositories import Publisher
from sshd import Sshd, running

# Tells the file of a unit of the system's packages.
SHOW = """\
case "$*" in
    *FragmentPath*ssh.service) echo "FragmentPath=$PWD/ssh.service" ;;
    *FragmentPath*) echo FragmentPath= ;;
esac
"""
# A user may let their own units linger if there is a file `allowed`.
LOGINCTL = """\
#!/bin/sh
cd "$(dirname "$0")"
case "$*" in
    *show-user*) [ -f lingers ] && echo yes || echo no ;;
    *enable-linger*) [ -f allowed ] && touch lingers ;;
esac
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the handlers that the board program sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def running_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One sshd for all tests."""
    with running(tmp_path_factory.mktemp("sshd"), str(Path(sys.executable).parent)) as sshd:
        yield sshd


@pytest.fixture
def sshd(running_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A board that answers over ssh, with its host key known."""
    monkeypatch.setenv("PATH", f"{running_sshd.programs}{os.pathsep}{os.environ['PATH']}")
    running_sshd.trust(running_sshd.public_key("host"))
    return running_sshd


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> KitMaker:
    """`make(answer)`: a small kit."""
    return KitMaker(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="session")
def environments(make: KitMaker, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The virtual environments that an install makes, which takes pip a second; for copies."""

    def install(prefix: Path) -> None:
        assert run("install", make("one"), "--prefix", prefix) == 0

    return once("environments", install) / "venvs"


@pytest.fixture(scope="session")
def prepare(environments: Path) -> Callable[[Path], Path]:
    """`prepare(prefix)`: a prefix with no version, and with the environment of the kits."""

    def call(prefix: Path) -> Path:
        prefix.mkdir()
        return copied(environments, prefix / "venvs").parent

    return call


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "home", "one")


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with systemctl for a user, the units that it knows and the calls that it got."""
    folder = tmp_path / "systemd"
    folder.mkdir()
    for name, text in {"systemctl": SYSTEMCTL + SHOW, "loginctl": LOGINCTL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "allowed").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "units"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(service, "_READY_S", 3.0)
    monkeypatch.setattr(sockets, "_ENDING_S", 1.0)
    yield folder
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "process").read_text()), signal.SIGTERM)


@pytest.fixture
def port() -> int:
    return free_port()
