"""The unit of a kit, with stand-ins for systemctl, which starts the command of the unit's file, and for loginctl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path

import pytest
from edgetune_runtime import cli
from edgetune_runtime.store import acknowledgement, service, sockets, switch, trial, versions
from edgetune_runtime.store.files import Store
from edgetune_runtime.store.kit import Kit, read_kit
from edgetune_runtime.store.systemd import user_name
from kills import KILLED, killed_at
from kits import KitMaker, ask, contents, run, with_fields, write_bundle
from ports import http_server
from repositories import Publisher

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")]


@pytest.fixture
def prefix(prepare: Callable[[Path], Path], tmp_path: Path) -> Path:
    return prepare(tmp_path / "home")


def served(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
        text: str = reply.read().decode()
        return text


def calls(systemd: Path) -> list[str]:
    """The calls of systemctl since the last time that change something."""
    found = (systemd / "calls").read_text().splitlines() if (systemd / "calls").exists() else []
    (systemd / "calls").unlink(missing_ok=True)
    return [call for call in found if " show " not in call]


@contextmanager
def other_server(port: int) -> Iterator[None]:
    """A program that answers everything with 200, and is no unit."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    with http_server(Ready, port):
        yield


def kit_with_golden(make: KitMaker, answer: str) -> Path:
    """A kit with a golden answer, which the stand-in for the runtime does not give over HTTP."""
    golden = {"prompt": "on", "answer": answer, "max_tokens": 1}
    adapter = {"name": "command", "method": "lora", "shapes": {}, "files": {}, "base_fingerprint": "ab"}
    base = {
        **{"name": "base", "fingerprint": "ab", "architecture": "llama", "quantization": None, "parameters": 1},
        **{"trained_context_length": 1, "layers": 1, "kv_values_per_token": 1, "tokenizer_sha256": ""},
        **{"chat_template_sha256": "", "files": {}},
    }
    adapters = {"command": adapter | {"golden": {"gguf": golden}}}
    manifest = {"schema": 2, "name": "home", "base": base, "adapters": adapters, "files": {}, "context_length": 1}
    bundle = {"manifest.json": json.dumps(manifest).encode(), "answer.txt": answer.encode()}
    out = make.folder / f"golden-{answer}"
    make.write(bundle, out)
    return out


def test_the_unit_follows_the_versions_and_goes_with_them(
    make: KitMaker, systemd: Path, port: int, prefix: Path
) -> None:
    options = ("--prefix", prefix)
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    # An install that was killed may have written the unit and no more.
    start = ["daemon-reload", "enable --quiet edgetune-home", "stop edgetune-home", "restart edgetune-home"]
    restart = [f"--user {call}" for call in start]
    assert calls(systemd) == restart
    assert served(port) == "one"
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    assert calls(systemd) == []
    assert run("install", make("two"), *options) == 0
    assert calls(systemd) == restart
    assert served(port) == "two"
    assert run("rollback", *options) == 0
    assert served(port) == "one"
    unit = systemd / "units/systemd/user/edgetune-home.service"
    assert unit.is_file()
    assert run("uninstall", *options) == 0
    assert not unit.exists() and not prefix.exists()
    removed = ["disable --quiet --now", "reset-failed", "clean --what=all"]
    assert calls(systemd)[-4:-1] == [f"--user {call} edgetune-home" for call in removed]


def test_a_unit_that_does_not_take_over_a_version_is_restarted(
    make: KitMaker, systemd: Path, port: int, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_RELOAD_S", 0.3)
    for answer in ("one", "two"):
        make.write(contents(write_bundle(tmp_path / "bundle", answer)), tmp_path / answer)
        calls(systemd)
        assert run("install", tmp_path / answer, "--prefix", prefix, "--service", "--port", port) == 0
        assert served(port) == answer
    called = calls(systemd)
    assert called[0] == "--user kill --kill-who=main --signal=HUP edgetune-home"
    assert called[-1] == "--user restart edgetune-home"


def test_an_install_that_changes_nothing_starts_a_unit_that_does_not_run(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--prefix", prefix)
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    service.Manager(user=True).call("stop", "edgetune-home")
    with pytest.raises(OSError, match=r"refused|reset"):
        served(port)
    assert run("install", make("one"), *options) == 0
    assert served(port) == "one"
    assert capfd.readouterr().err.endswith("edgetune-board: starting unit edgetune-home\n")


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("command", ["install", "update"])
def test_a_unit_that_was_stopped_to_make_room_runs_again_after_a_signal(
    command: str,
    sent: signal.Signals,
    make: KitMaker,
    systemd: Path,
    port: int,
    prefix: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--prefix", prefix)
    assert run("install", make("one"), *options, "--service", "--port", port) == 0
    # An update is another program, in which nothing has set how to end.
    signal.signal(sent, signal.SIG_DFL)
    publisher = Publisher(tmp_path / "host")
    publisher("two")
    source = ("--repo", publisher.repo, "--root", publisher.root)
    kit = make("two")

    def switch_to_two() -> int:
        if command == "install":
            return run("install", kit, *options)
        return cli.main(["update", "--apply", *map(str, (*source, *options))])

    monkeypatch.setattr(switch, "free_mb", lambda: 0.0)
    asked = trial.golden_answers

    def signalled(prefix: Path, kit: Kit) -> object:
        with pytest.raises(OSError, match=r"refused|reset"):
            served(port)
        os.kill(os.getpid(), sent)
        time.sleep(0.1)
        return asked(prefix, kit)

    monkeypatch.setattr(trial, "golden_answers", signalled)
    code = switch_to_two()
    assert (code, served(port)) == ((0, "two") if sent == signal.SIGHUP else (130, "one"))


def test_a_unit_that_was_stopped_to_make_room_runs_again_if_the_switch_cannot_be_noted(
    make: KitMaker, systemd: Path, port: int, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 0
    monkeypatch.setattr(switch, "free_mb", lambda: 0.0)
    (prefix / acknowledgement.NAME / "full").mkdir(parents=True)
    assert run("install", make("two"), "--prefix", prefix) == 2
    assert (served(port), ask(prefix)) == ("one", "one")


def test_a_prefix_that_is_reached_through_a_link_is_the_same(
    make: KitMaker, systemd: Path, port: int, prepare: Callable[[Path], Path], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    prepare(tmp_path / "disk/app")
    (tmp_path / "home").symlink_to("disk")
    assert run("install", make("one"), "--prefix", tmp_path / "home/app", "--service", "--port", port) == 0
    assert run("uninstall", "--prefix", tmp_path / "disk/app") == 0
    assert not (systemd / "units/systemd/user/edgetune-home.service").exists()


def test_the_address_of_a_unit_needs_one(make: KitMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option in (("--host", "0.0.0.0"), ("--port", "80")):
        assert run("install", make("one"), "--prefix", tmp_path / "home", *option) == 2
        assert capfd.readouterr().err == "edgetune-board: --host and --port are those of a unit; add --service\n"
    assert run("install", make("one"), "--prefix", tmp_path / "home", "--service", "--port", "0") == 2


def test_a_version_whose_unit_does_not_answer_is_left_again(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for answer in ("one", "two"):
        assert run("install", make(answer), "--prefix", prefix, "--service", "--port", port) == 0
    capfd.readouterr()
    assert run("install", make("mute"), "--prefix", prefix) == 4
    *_, going_back, error = capfd.readouterr().err.splitlines()
    assert going_back.startswith("edgetune-board: going back to version ")
    assert f"unit edgetune-home does not answer at http://127.0.0.1:{port}/readyz" in error
    assert (served(port), ask(prefix)) == ("two", "two")
    assert run("rollback", "--prefix", prefix) == 0
    assert served(port) == "one"


def test_a_unit_that_computes_the_states_of_its_prompts_is_waited_for(
    make: KitMaker,
    systemd: Path,
    port: int,
    prefix: Path,
    prepare: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_READY_S", 2.0)
    options = ("--prefix", prefix, "--service", "--port", port)
    assert run("install", make("slow"), *options) == 0
    monkeypatch.setattr(service, "_WARM_S", 1.0)
    assert run("uninstall", "--prefix", prefix) == 0
    prepare(prefix)
    assert run("install", make("slow"), *options) == 4


def test_a_version_whose_unit_gives_no_golden_answer_is_left_again(
    make: KitMaker,
    systemd: Path,
    port: int,
    prefix: Path,
    prepare: Callable[[Path], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 0
    kit = kit_with_golden(make, "two")
    acknowledgement.begin(prefix, str(versions.linked(prefix, versions.CURRENT)), 0)
    note = acknowledgement.read(prefix)
    assert run("install", kit, "--prefix", prefix) == 4
    assert note is not None
    assert acknowledgement.read(prefix) == note
    error = capfd.readouterr().err.splitlines()[-1]
    assert "unit edgetune-home: adapter command does not answer: HTTP Error 501" in error
    assert error.endswith("; see journalctl --user -u edgetune-home")
    assert (served(port), ask(prefix)) == ("one", "one")
    assert run("uninstall", "--prefix", prefix) == 0
    prepare(prefix)
    assert run("install", kit, "--prefix", prefix, "--service", "--port", port) == 4
    assert list((systemd / "units/systemd/user").iterdir()) == []


def test_a_switch_that_was_cut_off_before_the_unit_ran_is_undone_too(
    make: KitMaker, systemd: Path, port: int, prefix: Path
) -> None:
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 0
    mute = make("mute")
    kit = read_kit(mute)
    for file in kit.version_files:
        Store(prefix).put(file, mute)
    versions.place(prefix, kit)
    versions.switch(prefix, kit.version)
    assert run("install", mute, "--prefix", prefix) == 4
    assert (served(port), ask(prefix)) == ("one", "one")


def test_a_port_that_another_program_has_is_refused(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", make("two"), "--prefix", prefix, "--service", "--port", port) == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
    with other_server(used):
        assert run("install", make("one"), "--prefix", prefix, "--service", "other", "--port", used) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"another program listens on port {used} of 127.0.0.1; choose another --port" in error
    assert (served(port), ask(prefix)) == ("two", "two")
    assert [path.stem for path in (systemd / "units/systemd/user").iterdir()] == ["edgetune-home"]


def test_a_unit_with_another_name_takes_the_port_of_the_one_before(
    make: KitMaker, systemd: Path, port: int, prefix: Path
) -> None:
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 0
    assert run("install", make("two"), "--prefix", prefix, "--service", "other", "--port", port) == 0
    assert (served(port), ask(prefix)) == ("two", "two")
    assert [path.stem for path in (systemd / "units/systemd/user").iterdir()] == ["other"]


def test_what_an_install_that_was_killed_has_written_is_removed(
    make: KitMaker, systemd: Path, port: int, prepare: Callable[[Path], Path], tmp_path: Path
) -> None:
    kit, prefix, units = make("one"), tmp_path / "home", systemd / "units/systemd/user"
    words = ("install", kit, "--prefix", prefix, "--service", "--host", "0.0.0.0", "--port", port)
    left = set[str]()
    for write in count(1):
        prepare(prefix)
        code = killed_at(write, lambda: run(*words), within="service.json")
        left |= {path.name for path in units.glob("*.service")}
        assert run("uninstall", "--prefix", prefix) == 0
        assert (prefix.exists(), list(units.glob("*.service"))) == (False, [])
        if code != KILLED:
            break
    assert code == 0 and left


def test_an_answer_of_another_program_does_not_make_the_unit_healthy(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = make("one")
    assert run("install", kit, "--prefix", prefix, "--service", "--port", port) == 0
    assert run("install", kit, "--prefix", prefix) == 0
    stopped = int((systemd / "process").read_text())
    os.kill(stopped, signal.SIGTERM)
    sockets.require_free("127.0.0.1", port)
    (systemd / "process").unlink()
    with other_server(port):
        assert run("install", kit, "--prefix", prefix) == 2
        # Active, but it is not the unit that listens.
        with subprocess.Popen(["sleep", "60"]) as sleeping:
            (systemd / "process").write_text(str(sleeping.pid))
            assert run("install", kit, "--prefix", prefix) == 4
            sleeping.kill()
    assert "unit edgetune-home does not answer" in capfd.readouterr().err


def test_a_unit_of_others_is_neither_replaced_nor_removed(
    make: KitMaker,
    systemd: Path,
    port: int,
    prepare: Callable[[Path], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    units, prefix, other = systemd / "units/systemd/user", tmp_path / "home", tmp_path / "other"
    units.mkdir(parents=True)
    foreign = units / "web.service"
    foreign.write_text("[Service]\n")
    (systemd / "ssh.service").touch()
    for name, path in (("web", foreign), ("ssh", systemd / "ssh.service")):
        assert run("install", make("one"), "--prefix", prefix, "--service", name, "--port", port) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.endswith(f"unit {name} exists and is not of {prefix}: {path}; choose another name: --service NAME")
        assert not prefix.exists()
    assert (foreign.read_text(), calls(systemd)) == ("[Service]\n", [])
    foreign.unlink()
    for folder in (prefix, other):
        prepare(folder)
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 0
    assert run("install", make("two"), "--prefix", other, "--service", "--port", port) == 2
    assert served(port) == "one"
    assert run("install", make("two"), "--prefix", other) == 0
    shutil.copy(prefix / "service.json", other / "service.json")
    assert run("install", make("three"), "--prefix", other) == 2
    assert ask(other) == "two"
    capfd.readouterr()
    assert run("uninstall", "--prefix", other) == 0
    assert f"unit edgetune-home stays, as it is not of {other}" in capfd.readouterr().err
    assert served(port) == "one"


@pytest.mark.parametrize("is_allowed", [True, False])
def test_a_user_is_told_if_the_unit_ends_with_their_session(
    is_allowed: bool, make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not is_allowed:
        (systemd / "allowed").unlink()
    words = ("install", make("one"), "--prefix", prefix, "--service", "--port", port)
    assert run(*words) == 0
    assert (systemd / "lingers").exists() == is_allowed
    told = [line for line in capfd.readouterr().err.splitlines() if "loginctl" in line]
    assert len(told) == (0 if is_allowed else 1)
    assert is_allowed or ("ends when you log out" in told[0] and "sudo loginctl enable-linger" in told[0])
    assert run(*words, "--json") == 0
    assert len(json.loads(capfd.readouterr().out)["warnings"]) == len(told)


def test_damaged_settings_of_the_unit_are_said_and_count_as_none(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unit = ("--service", "--port", port)
    assert run("install", make("one"), "--prefix", prefix, *unit) == 0
    settings, said = prefix / "service.json", list[str]()
    settings_of = '{{"name": "{}", "port": {}, "user": true}}'.format
    for damage in ("", settings_of("a/b", "1"), settings_of("home", '"1"'), "[]"):
        settings.write_text(damage)
        assert service.installed(prefix, said.append) is None
    assert len(said) == 4 and all(line.startswith(f"{settings} is damaged") for line in said)
    capfd.readouterr()
    assert run("install", make("two"), "--prefix", prefix) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1 and f"{settings} is damaged" in told[0]
    assert (ask(prefix), served(port)) == ("two", "one")
    assert run("rollback", "--prefix", prefix) == 0
    settings.write_text("[]")
    capfd.readouterr()
    assert run("install", make("two"), "--prefix", prefix, *unit) == 0
    assert served(port) == "two" and "damaged" not in capfd.readouterr().err
    settings.write_text("[]")
    assert run("list", "--prefix", prefix) == 0
    capfd.readouterr()
    assert run("uninstall", "--prefix", prefix) == 0
    told = f"{settings} is damaged; the units of {prefix} are found by their files: edgetune-home"
    assert capfd.readouterr().err == f"edgetune-board: {told}\n"
    assert not prefix.exists() and list((systemd / "units/systemd/user").iterdir()) == []


def test_a_server_that_others_can_reach_gets_a_key(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = make("one")
    options = ("--prefix", prefix, "--service", "--port", port)
    assert run("install", kit, *options) == 0
    assert not (prefix / "keys").exists()
    capfd.readouterr()
    assert run("install", kit, *options, "--host", "0.0.0.0") == 0
    keys = prefix / "keys"
    assert f"clients need the key in {keys}" in capfd.readouterr().out
    assert (len(keys.read_text().strip()), keys.stat().st_mode & 0o777) == (64, 0o600)
    unit = (systemd / "units/systemd/user/edgetune-home.service").read_text()
    assert f'--host 0.0.0.0 --port {port} --warm --disk-mb-per-day 0 --api-key-file "{keys}"' in unit
    before = keys.read_text()
    assert run("install", make("two"), *options, "--host", "0.0.0.0") == 0
    assert keys.read_text() == before
    # It listens where it did unless an option says otherwise.
    assert run("install", make("one"), "--prefix", prefix, "--service") == 0
    unit = (systemd / "units/systemd/user/edgetune-home.service").read_text()
    assert f"--host 0.0.0.0 --port {port} " in unit


def test_a_user_without_a_session_is_told_to_log_in(
    make: KitMaker, systemd: Path, port: int, prefix: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (systemd / "systemctl").write_text("#!/bin/sh\necho 'Failed to connect to user scope bus' >&2\nexit 1\n")
    assert run("install", make("one"), "--prefix", prefix, "--service", "--port", port) == 5
    user = user_name()
    assert f"Failed to connect to user scope bus; log in as {user} itself, such as with ssh" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["install", "rollback", "uninstall"])
def test_another_account_changes_nothing_that_the_unit_of_a_user_serves(
    command: str,
    make: KitMaker,
    systemd: Path,
    port: int,
    prefix: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kit = make("one")
    assert run("install", kit, "--prefix", prefix, "--service", "--port", port) == 0
    if os.getuid() == 0:
        os.chown(prefix / "service.json", 4321, -1)
    user = user_name((prefix / "service.json").stat().st_uid)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert run(command, *([make("two")] if command == "install" else []), "--prefix", prefix) == 2
    told = f"{prefix / 'service.json'} is of user {user}, whose systemd runs it; log in as {user}, such as with ssh"
    assert told in capfd.readouterr().err
    assert (ask(prefix), served(port)) == ("one", "one")
    assert (systemd / "units/systemd/user/edgetune-home.service").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--service", "a/b"), "not a name of a unit"),
        (("--service", "--port", 70000), "not a port"),
        (("--service", "--host", "board.local"), "not an IP address"),
        (("--service", "--host", "fe80::1%eth0"), "--host 'fe80::1%eth0' has a zone; use :: to let others in"),
    ],
)
def test_a_wrong_unit_is_refused_before_anything_is_installed(
    options: tuple[object, ...], told: str, make: KitMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", make("one"), "--prefix", tmp_path / "home", *options) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("wrong", ["'", '"', "\\", "\n"])
@pytest.mark.parametrize("option", ["--service", "--updates"])
def test_a_prefix_whose_programs_systemd_does_not_start_is_refused(
    option: str,
    wrong: str,
    make: KitMaker,
    systemd: Path,
    publisher: Publisher,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--service"] if option == "--service" else ["--updates", "http://x", "--root", publisher.root]
    assert run("install", make("one"), "--prefix", tmp_path / f"home{wrong}1", *words) == 2
    told = f"has {wrong!r}, which no program of a systemd unit may have; choose another --prefix"
    assert told in capfd.readouterr().err
    assert not (tmp_path / f"home{wrong}1").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("user", [True, False])
def test_systemd_accepts_the_unit(user: bool, make: KitMaker, prepare: Callable[[Path], Path], tmp_path: Path) -> None:
    prefix = prepare(tmp_path / "100% of a $home")
    kit = make("one", change=with_fields(opening={"context_length": 512, "kv": "q8_0", "cache_mb": 16.0}))
    assert run("install", kit, "--prefix", prefix) == 0
    unit = tmp_path / "edgetune-home.service"
    unit.write_text(service.Unit("edgetune-home", 8080, user, host="::").unit(prefix, read_kit(kit)))
    command = ["systemd-analyze", "verify", *(["--user"] if user else []), "--man=no", str(unit)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    limit_mib = read_kit(kit).service["memory_max_mb"] * 10**6 // 2**20
    assert f"\nMemoryMax={limit_mib}M\n" in unit.read_text()
    assert "\nLimitNOFILE=4096\n" in unit.read_text()
    assert " --context-length 512 --kv q8_0 --cache-mb 16.0 --warm --disk-mb-per-day 0 " in unit.read_text()
