"""The timer of daily updates, with a stand-in for systemctl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime.store.timer import Timer
from edgetune_runtime.update import update
from edgetune_runtime.update.state import read_state, read_trusted_root
from kits import KitMaker, ask, run
from repositories import Publisher, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")]


def test_a_kit_follows_a_repository_until_it_is_removed(
    prepare: Callable[[Path], Path], make: KitMaker, systemd: Path, tmp_path: Path
) -> None:
    prefix, units = prepare(tmp_path / "home"), systemd / "units/systemd/user"
    publisher = Publisher(tmp_path / "host")
    publisher("two")
    with serving(publisher.repo) as server:
        words = ("install", make("one"), "--prefix", prefix, "--updates", server.url, "--root", publisher.root)
        assert run(*words) == 0
        assert sorted(path.name for path in units.iterdir()) == [
            "edgetune-home-update.service", "edgetune-home-update.timer"
        ]  # fmt: skip
        assert "--user enable --quiet --now edgetune-home-update.timer" in (systemd / "calls").read_text()
        assert (read_state(prefix).repo, read_state(prefix).bundle) == (server.url, "home")
        assert read_trusted_root(prefix) == publisher.root.read_bytes()
        assert run(*words) == 0
        # What the timer runs needs no more options.
        assert update.apply(prefix, update.UpdateSource(), lambda _: None)[1]
    assert ask(prefix) == "two"
    assert run("install", make("three"), "--prefix", prefix) == 0
    assert len(list(units.iterdir())) == 2
    assert run("uninstall", "--prefix", prefix) == 0
    calls = (systemd / "calls").read_text()
    assert "--user disable --quiet --now edgetune-home-update.timer" in calls
    assert "--user reset-failed edgetune-home-update.service" in calls
    assert list(units.iterdir()) == [] and not prefix.exists()


def test_what_cannot_be_followed_is_refused_before_anything_is_installed(
    make: KitMaker, systemd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kit, prefix, other = make("one"), tmp_path / "home", tmp_path / "other.json"
    other.write_text('{"signed": {"_type": "timestamp"}}')
    units = systemd / "units/systemd/user"
    units.mkdir(parents=True)
    for words, problem in (
        (("--updates", "https://me:secret@x", "--root", other), "--updates has a login in its address"),
        (("--updates", "ftp://x", "--root", other), "--updates 'ftp://x' is not an address of a repository"),
        (("--updates", "http://x"), "add --root FILE"),
        (("--updates", "http://x", "--root", tmp_path / "none"), "cannot read --root"),
        (("--updates", "http://x", "--root", other), "has no root of a repository"),
        (("--root", other), "add --updates URL"),
    ):
        assert run("install", kit, "--prefix", prefix, *words) in {2, 3}
        assert problem in capfd.readouterr().err
    assert not prefix.exists()


@pytest.mark.parametrize("unit", ["edgetune-home-update.service", "edgetune-home-update.timer"])
def test_a_timer_of_others_is_neither_replaced_nor_removed(
    unit: str, make: KitMaker, systemd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    units, publisher = systemd / "units/systemd/user", Publisher(tmp_path / "host")
    units.mkdir(parents=True)
    (units / unit).write_text("[Unit]\n")
    words = ("--updates", "http://x", "--root", publisher.root)
    assert run("install", make("one"), "--prefix", tmp_path / "home", *words) == 2
    assert f"unit {unit} exists and is not of" in capfd.readouterr().err
    assert run("uninstall", "--prefix", tmp_path / "home") in {0, 3}
    assert [path.read_text() for path in units.iterdir()] == ["[Unit]\n"]


def test_a_user_is_told_if_the_timer_ends_with_their_session(
    prepare: Callable[[Path], Path],
    make: KitMaker,
    systemd: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (systemd / "allowed").unlink()
    words = ("--updates", "http://x", "--root", Publisher(tmp_path / "host").root)
    assert run("install", make("one"), "--prefix", prepare(tmp_path / "home"), *words) == 0
    assert "timer edgetune-home-update ends when you log out" in capfd.readouterr().err


@pytest.mark.parametrize("cut_off", ["edgetune-home-update.service", "edgetune-home-update.timer"])
def test_a_timer_whose_install_was_cut_off_is_removed(cut_off: str, systemd: Path, tmp_path: Path) -> None:
    timer, units = Timer("edgetune-home-update", user=True), systemd / "units/systemd/user"
    units.mkdir(parents=True)
    timer.install(tmp_path, "home")
    (units / cut_off).unlink()
    (systemd / "calls").unlink()
    timer.remove(tmp_path)
    assert list(units.iterdir()) == []
    # systemctl fails for a timer that is not there.
    has_timer = cut_off.endswith(".service")
    assert ("disable --quiet --now edgetune-home-update.timer" in (systemd / "calls").read_text()) == has_timer


def test_a_timer_with_damaged_settings_is_removed_with_the_unit(
    prepare: Callable[[Path], Path], make: KitMaker, systemd: Path, port: int, tmp_path: Path
) -> None:
    prefix, units = prepare(tmp_path / "home"), systemd / "units/systemd/user"
    unit = ("--service", "--port", port, "--updates", "http://x", "--root", Publisher(tmp_path / "host").root)
    assert run("install", make("one"), "--prefix", prefix, *unit) == 0
    assert len(list(units.iterdir())) == 3
    for name in ("service.json", "timer.json"):
        (prefix / name).write_text("{}")
    assert run("uninstall", "--prefix", prefix) == 0
    assert list(units.iterdir()) == [] and not prefix.exists()


@pytest.mark.parametrize("prefix", ["/usr/local/$home 1%", "/tmp/home"])
def test_the_update_of_a_system_may_write_to_its_prefix(prefix: str) -> None:
    text = Timer("edgetune-home-update", user=False).units(Path(prefix), "home")["edgetune-home-update.service"]
    path = prefix.replace("%", "%%")
    assert f'ReadWritePaths="{path}"' in text
    assert f'ExecStart="{path}/bin/edgetune-run" update --apply --prefix "{path.replace("$", "$$")}"\n' in text
    assert ("PrivateTmp=yes" in text) == prefix.startswith("/usr")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("user", [True, False])
def test_systemd_accepts_the_timer(user: bool, prepare: Callable[[Path], Path], make: KitMaker, tmp_path: Path) -> None:
    prefix = prepare(tmp_path / "100% of a home")
    assert run("install", make("one"), "--prefix", prefix) == 0
    for name, text in Timer("edgetune-home-update", user).units(prefix, "home").items():
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", *(["--user"] if user else []), "--man=no"]
    command.append(str(tmp_path / "edgetune-home-update.timer"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
