"""The unit of a kit, with a stand-in for systemctl that starts the command of the unit's file."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kits import SYSTEMCTL, KitMaker, ask

from edgetune.delivery.board import main, service
from edgetune.delivery.board.kit import read_kit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> KitMaker:
    return KitMaker(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with systemctl for a user, the units that it knows and the calls that it got."""
    folder = tmp_path / "systemd"
    folder.mkdir()
    (folder / "systemctl").write_text(SYSTEMCTL)
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "units"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(service, "_READY_S", 5.0)
    yield folder
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "process").read_text()), signal.SIGTERM)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found: int = taken.getsockname()[1]
        return found


def run(*words: object) -> int:
    return main.main([str(word) for word in words])


def served(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
        text: str = reply.read().decode()
        return text


def calls(systemd: Path) -> list[str]:
    """The calls of systemctl since the last time."""
    found = (systemd / "calls").read_text().splitlines() if (systemd / "calls").exists() else []
    (systemd / "calls").unlink(missing_ok=True)
    return found


def test_the_unit_follows_the_versions_and_goes_with_them(
    make: KitMaker, systemd: Path, port: int, tmp_path: Path
) -> None:
    prefix = tmp_path / "home"
    options = ("--prefix", prefix)
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    restart = "--user restart edgetune-home"
    assert calls(systemd) == ["--user daemon-reload", "--user enable --quiet edgetune-home", restart]
    assert served(port) == "one"
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    assert calls(systemd) == []
    assert run("install", make("two"), *options) == 0
    assert calls(systemd) == [restart]
    assert served(port) == "two"
    assert run("rollback", *options) == 0
    assert served(port) == "one"
    unit = systemd / "units/systemd/user/edgetune-home.service"
    assert unit.is_file()
    assert run("uninstall", *options) == 0
    assert not unit.exists() and not prefix.exists()
    assert "--user disable --quiet --now edgetune-home" in calls(systemd)


def test_a_version_whose_unit_does_not_answer_is_left_again(
    make: KitMaker, systemd: Path, port: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "home"
    for answer in ("one", "two"):
        assert run("install", make(answer), "--prefix", prefix, "--service", "--port", port) == 0
    capfd.readouterr()
    assert run("install", make("mute"), "--prefix", prefix) == 4
    *_, going_back, error = capfd.readouterr().err.splitlines()
    assert going_back.startswith("edgetune-board: going back to version ")
    assert f"unit edgetune-home does not answer at http://127.0.0.1:{port}/readyz" in error
    assert (served(port), ask(prefix)) == ("two", "two")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        assert run("install", make("two"), "--prefix", prefix, "--service", "other", "--port", used) == 4
    assert (served(port), ask(prefix)) == ("two", "two")
    assert run("rollback", "--prefix", prefix) == 0
    assert served(port) == "one"


def test_a_server_that_others_can_reach_gets_a_key(
    make: KitMaker, systemd: Path, port: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix, kit = tmp_path / "home", make("one")
    options = ("--prefix", prefix, "--service", "--port", port)
    assert run("install", kit, *options) == 0
    assert not (prefix / "keys").exists()
    capfd.readouterr()
    assert run("install", kit, *options, "--host", "0.0.0.0") == 0
    keys = prefix / "keys"
    assert f"clients need the key in {keys}" in capfd.readouterr().out
    assert (len(keys.read_text().strip()), keys.stat().st_mode & 0o777) == (64, 0o600)
    unit = (systemd / "units/systemd/user/edgetune-home.service").read_text()
    assert f'--host 0.0.0.0 --port {port} --api-key-file "{keys}"' in unit
    before = keys.read_text()
    assert run("install", make("two"), *options, "--host", "0.0.0.0") == 0
    assert keys.read_text() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--service", "a/b"), "no name of a unit"),
        (("--service", "--port", 70000), "no port"),
        (("--service", "--host", "board.local"), "no IP address"),
    ],
)
def test_a_wrong_unit_is_refused_before_anything_is_installed(
    options: tuple[object, ...], told: str, make: KitMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", make("one"), "--prefix", tmp_path / "home", *options) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("user", [True, False])
def test_systemd_accepts_the_unit(user: bool, make: KitMaker, tmp_path: Path) -> None:
    prefix = tmp_path / "100% of a home"
    kit = make("one")
    assert run("install", kit, "--prefix", prefix) == 0
    unit = tmp_path / "edgetune-home.service"
    unit.write_text(service.Service("edgetune-home", 8080, user, host="::").unit(prefix, read_kit(kit)))
    command = ["systemd-analyze", "verify", *(["--user"] if user else []), "--man=no", str(unit)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    limit_mib = read_kit(kit).service["memory_max_mb"] * 10**6 // 2**20
    assert f"\nMemoryMax={limit_mib}M\n" in unit.read_text()
