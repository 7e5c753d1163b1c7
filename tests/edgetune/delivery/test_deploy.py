from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from edgetune_devices import boards
from edgetune_runtime.bundle import MANIFEST_NAME, sha256_of
from edgetune_runtime.errors import (
    BusyError,
    IncompatibleError,
    NotFoundError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from edgetune_runtime.store.durable import installing
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME
from edgetune_runtime.update.state import read_state, read_trusted_root
from kits import PYTHON, SYSTEMCTL, KitMaker, ask, copied, with_fields, write_bundle
from repositories import Publisher
from sshd import Answer, Sshd, cut_in_the_middle, cut_ssh, free_port, needs_sshd
from waiting import wait_for

from edgetune.cli.main import main
from edgetune.common.progress import Progress
from edgetune.delivery.board.updates import Repository
from edgetune.delivery.deploy.deploy import (
    Assemble,
    Deployed,
    DeployOptions,
    Where,
    deploy,
    list_versions,
    roll_back,
)
from edgetune.delivery.deploy.probe import BoardFacts
from edgetune.delivery.deploy.ssh import Connection
from edgetune.delivery.deploy.target import Target, parse_target
from edgetune.delivery.kit.make import AssembledKit

pytestmark = [pytest.mark.slow, needs_sshd]


@dataclass(frozen=True)
class Board:
    """A board, and the deploys of a test to it."""

    sshd: Sshd
    prefix: Path
    work: Path
    make: KitMaker

    @property
    def target(self) -> Target:
        return parse_target(self.sshd.target)

    @property
    def where(self) -> Where:
        return Where("home", str(self.prefix))

    def assemble(self, bundle: Path, **changes: object) -> Assemble:
        """Makes the kit of a bundle; `changes` go into kit.json."""
        return lambda _board, _python: self.make.assembled(contents(bundle), with_fields(**changes))

    def deploy(self, bundle: Path, *, waits_healthy: bool = False, **changes: object) -> Deployed:
        options = DeployOptions("laptop", waits_healthy=waits_healthy)
        return deploy(self.target, self.where, self.assemble(bundle, **changes), options, Progress(quiet=True))

    def states(self) -> list[tuple[str, str]]:
        return [(item["version"], item["state"]) for item in list_versions(self.target, self.where).versions]


def contents(bundle: Path) -> dict[str, Path | bytes]:
    return {str(path.relative_to(bundle)): path for path in bundle.rglob("*") if path.is_file()}


@pytest.fixture
def bare(sshd: Sshd, make: KitMaker, tmp_path: Path) -> Board:
    """A board on which nothing is installed."""
    return Board(sshd, tmp_path / "board", tmp_path, make)


@pytest.fixture
def board(bare: Board, environments: Path) -> Board:
    """A board that has the virtual environment, so that no wheels are sent and installed."""
    (bare.prefix / "venvs").mkdir(parents=True)
    for path in environments.iterdir():
        copied(path, bare.prefix / "venvs" / path.name)
    return bare


def test_a_second_deploy_sends_nothing_and_a_changed_bundle_only_what_changed(bare: Board, bundle: Path) -> None:
    first = bare.deploy(bundle)
    assert first.changed
    kit = bare.assemble(bundle)("laptop", PYTHON).kit
    described = sum((bare.prefix / "incoming" / name).stat().st_size for name in (KIT_NAME, SUMS_NAME))
    needed = [*kit.wheel_files, *kit.bundle_files]
    assert first.sent_bytes == described + sum(file.bytes for file in needed)
    assert bare.states() == [(first.version, "current")]
    assert ask(bare.prefix) == "one"

    again = bare.deploy(bundle)
    assert (again.version, again.changed, again.sent_bytes) == (first.version, False, 0)
    assert str(again) == f"{bare.sshd.target}: version {first.version} was there already, nothing sent"

    second = bare.deploy(write_bundle(bundle, "two"))
    described = sum((bare.prefix / "incoming" / name).stat().st_size for name in (KIT_NAME, SUMS_NAME))
    assert second.sent_bytes == described + len("two") + (bundle / MANIFEST_NAME).stat().st_size
    assert bare.states() == [(second.version, "current"), (first.version, "previous")]
    assert ask(bare.prefix) == "two"


def test_rollback_switches_to_the_version_before_and_back(board: Board, bundle: Path) -> None:
    first = board.deploy(bundle)
    with pytest.raises(NotFoundError, match=f"{board.sshd.target}: .* no previous version"):
        roll_back(board.target, board.where)
    second = board.deploy(write_bundle(bundle, "two"))
    assert roll_back(board.target, board.where).version == first.version
    assert board.states() == [(first.version, "current"), (second.version, "previous")]


def test_a_bundle_that_is_not_installed_cannot_be_listed(board: Board) -> None:
    with pytest.raises(NotFoundError, match=f"home is not installed in {board.prefix}; deploy it first"):
        list_versions(board.target, board.where)


def test_a_prefix_is_taken_as_it_is_written(board: Board) -> None:
    prefix = f"{board.prefix}\\\\n"
    with pytest.raises(NotFoundError) as caught:
        list_versions(board.target, Where("home", prefix))
    assert f"is not installed in {prefix};" in str(caught.value)


def test_a_deploy_that_was_cut_resumes_and_the_old_version_runs(board: Board, bundle: Path) -> None:
    first = board.deploy(bundle)
    data = os.urandom(3_000_000)
    (bundle / "large").write_bytes(data)
    write_bundle(bundle, "two")
    part = board.prefix / f"files/{sha256_of(bundle / 'large')}.part"
    cut = cut_in_the_middle(part.parent)
    with cut, pytest.raises(UnreachableError, match="connection was lost; run the command again, it resumes"):
        board.deploy(bundle)
    assert board.states() == [(first.version, "current")]
    assert ask(board.prefix) == "one"
    wait_for(lambda: not is_locked(board.prefix / "installing.lock"))
    assert 0 < part.stat().st_size < len(data)
    second = board.deploy(bundle)
    assert second.sent_bytes < len(data)
    assert (board.prefix / "current/bundle/large").read_bytes() == data
    assert board.states() == [(second.version, "current"), (first.version, "previous")]


def is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_file_that_was_damaged_on_the_way_is_refused(board: Board, bundle: Path) -> None:
    first = board.deploy(bundle)
    made = board.assemble(write_bundle(bundle, "two"))("laptop", PYTHON)
    (bundle / "answer.txt").write_text("ten")
    with pytest.raises(VerificationError, match="are damaged; run the deploy again"):
        deploy(board.target, board.where, lambda *_: made, DeployOptions("laptop"), Progress(quiet=True))
    assert board.states() == [(first.version, "current")]


def test_two_deploys_at_once_are_refused(board: Board, bundle: Path) -> None:
    with installing(board.prefix), pytest.raises(BusyError, match=f"another command is using {board.prefix}"):
        board.deploy(bundle)
    assert board.deploy(bundle).changed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"machine": "aarch64", "board": "pi-4"},
            rf"this machine is {platform.machine()}, the kit is for aarch64 \(pi-4\)",
        ),
        ({"needs": {"instructions": ["amx"], "glibc": "2.0", "ram_mb": 1, "packages_mb": 1}}, "lacks amx"),
        (
            {"needs": {"instructions": [], "glibc": "2.0", "ram_mb": 10**7, "packages_mb": 1}},
            "needs at least 10000000 MB of mem",
        ),
        (
            {"needs": {"instructions": [], "glibc": "2.0", "ram_mb": 1, "packages_mb": 10**9}},
            "needs 10000000.. MB of disk",
        ),
    ],
)
def test_a_board_that_is_not_enough_gets_no_file(
    bare: Board, bundle: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(IncompatibleError, match=rf"^{bare.sshd.target}: .*{problem}.*; ") as error:
        bare.deploy(bundle, **changes)
    assert "\n" not in str(error.value)
    (program,) = (bare.prefix / "files").iterdir()
    assert program.stat().st_size < 250_000


@pytest.mark.parametrize(
    ("program", "text", "problem"),
    [
        ("getconf", "32", f"the system is 32-bit on {platform.machine()}; install a 64-bit system"),
        ("uname", "armv7l", "the system is 64-bit on armv7l; install a 64-bit system"),
        ("grep", "", "the board did not say its memory; deploy needs Linux"),
        ("python3", "3.9", "the board has Python 3.9; install 3.11 or newer"),
        ("python3", "", "the board has no python3; install 3.11 or newer"),
    ],
)
def test_a_board_with_too_old_a_system_is_refused_with_the_reason(
    board: Board, bundle: Path, program: str, text: str, problem: str
) -> None:
    stub = board.sshd.board_programs / program
    stub.write_text(f"#!/bin/sh\necho {text}\n")
    stub.chmod(0o755)
    try:
        with pytest.raises(IncompatibleError, match=problem):
            board.deploy(bundle)
    finally:
        stub.unlink()


def _facts(machine: str, model: str, ram_mib: int) -> BoardFacts:
    return BoardFacts("/opt/edgetune/home", machine, ram_mib, model, PYTHON, None, has_unit=False)


PI_4 = "Raspberry Pi 4 Model B Rev 1.4"


@pytest.mark.parametrize(
    ("model", "machine", "ram_mib", "name"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "aarch64", 417, "pi-zero-2w"),
        (PI_4, "aarch64", 909, "pi-4-1gb"),
        (PI_4, "aarch64", 1843, "pi-4-2gb"),
        (PI_4, "aarch64", 2800, "pi-4-2gb"),
        (PI_4, "aarch64", 3792, "pi-4"),
        (PI_4, "aarch64", 7819, "pi-4-8gb"),
        ("Raspberry Pi 5 Model B Rev 1.0", "aarch64", 8060, "pi-5"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "aarch64", 905, "pi-3b-plus"),
        ("Raspberry Pi 400 Rev 1.0", "aarch64", 3792, "pi-4"),
        ("Raspberry Pi 500 Rev 1.0", "aarch64", 8060, "pi-5"),
        ("Radxa ROCK 5 Model B", "aarch64", 7819, "rock-5"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "aarch64", 7620, "jetson-orin-nano"),
        ("", "x86_64", 3900, "laptop"),
    ],
)
def test_a_board_is_known_by_its_model_and_memory(model: str, machine: str, ram_mib: int, name: str) -> None:
    assert _facts(machine, model, ram_mib).board_name(None) == name


@pytest.mark.parametrize(
    ("wanted", "ram_mib", "name"),
    [("pi-4", 909, "pi-4-1gb"), ("pi-4", 7819, "pi-4"), ("pi-4-2gb", 3792, "pi-4-2gb"), ("pi-5-4gb", 3792, "pi-5-4gb")],
)
def test_a_board_that_is_named_has_no_more_memory_than_there_is(wanted: str, ram_mib: int, name: str) -> None:
    assert _facts("aarch64", PI_4, ram_mib).board_name(wanted) == name


def test_a_board_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text((boards.FOLDER / "pi-4.toml").read_text())
    assert _facts("aarch64", "Toaster 2", 909).board_name(str(path)) == str(path)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("pi-3b-plus", "the board has 417 MiB of memory, and pi-3b-plus has 1024 MiB or more"),
        ("pi-4-2gb", "the board has 417 MiB of memory, and pi-4-2gb has 2048 MiB or more"),
        ("pi-5", "the board has 417 MiB of memory, and pi-5 has 2048 MiB or more; give a similar board of this size"),
    ],
)
def test_a_board_with_less_memory_than_the_one_that_is_named_is_refused(wanted: str, problem: str) -> None:
    with pytest.raises(IncompatibleError, match=problem):
        _facts("aarch64", PI_4, 417).board_name(wanted)


def test_the_kit_is_that_of_the_memory_which_the_board_reports(
    board: Board, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def assemble(name: str, _python: str) -> AssembledKit:
        raise IncompatibleError(f"asked for {name}", "")

    said = {"uname": "aarch64", "grep": "MemTotal:         931500 kB"}
    stubs = [board.sshd.board_programs / name for name in said]
    try:
        for stub in stubs:
            stub.write_text(f"#!/bin/sh\necho '{said[stub.name]}'\n")
            stub.chmod(0o755)
        with pytest.raises(IncompatibleError, match="asked for pi-4-1gb"):
            deploy(board.target, board.where, assemble, DeployOptions("pi-4"), Progress())
    finally:
        for stub in stubs:
            stub.unlink()
    assert "909 MiB of memory, so the kit is the one for pi-4-1gb" in capsys.readouterr().err


def test_a_board_that_is_not_known_must_be_named() -> None:
    facts = _facts("aarch64", "Toaster 2", 3792)
    with pytest.raises(UsageError, match=r"model 'Toaster 2' is not known; give a similar one with --board: .*pi-4"):
        facts.board_name(None)


def test_a_prefix_that_cannot_be_written_to_is_named(board: Board, bundle: Path) -> None:
    (board.work / "file").touch()
    where = Where("home", str(board.work / "file"))
    with pytest.raises(UsageError, match=r"mkdir: .*; choose another --prefix"):
        deploy(board.target, where, board.assemble(bundle), DeployOptions("laptop"), Progress(quiet=True))


@pytest.fixture
def unit(board: Board) -> Iterator[int]:
    """The port of a unit that the board has already, with a stand-in for systemctl."""
    programs = board.sshd.board_programs
    (programs / "systemctl").write_text(SYSTEMCTL)
    (programs / "systemctl").chmod(0o755)
    (programs / "units").symlink_to(board.sshd.folder / ".config")
    port = free_port()
    # A user's unit, as root's would be in /etc.
    settings = {"name": "edgetune-home", "port": port, "user": True}
    (board.prefix / "service.json").write_text(json.dumps(settings))
    yield port
    os.kill(int((programs / "process").read_text()), signal.SIGTERM)
    (programs / "systemctl").unlink()


def test_the_unit_of_a_board_answers_with_the_new_version(board: Board, bundle: Path, unit: int) -> None:
    # A server takes over no other base, so that the unit is restarted.
    for answer, formats in (("one", ["gguf"]), ("two", ["gguf", "onnx"]), ("two", ["gguf", "onnx"])):
        board.deploy(write_bundle(bundle, answer, formats), waits_healthy=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{unit}/", timeout=5) as reply:
            assert reply.read().decode() == answer


def test_a_board_reads_the_root_of_the_repository_to_update_from_before_it_installs(board: Board, bundle: Path) -> None:
    options = DeployOptions("laptop", repository=Repository("https://example.org/repo", b"{}"))
    with pytest.raises(UsageError, match=r"incoming/root\.json has no root of a repository"):
        deploy(board.target, board.where, board.assemble(bundle), options, Progress(quiet=True))
    assert not (board.prefix / "current").exists()


def test_a_login_shell_may_print_something(board: Board, bundle: Path) -> None:
    greeting = board.sshd.folder / ".bashrc"
    try:
        for answer, words in (("one", "echo welcome"), ("two", "printf welcome")):
            greeting.write_text(f"{words}\n", encoding="utf-8")
            deployed = board.deploy(write_bundle(bundle, answer))
            assert board.states()[0] == (deployed.version, "current")
    finally:
        greeting.unlink()


def test_an_install_goes_on_when_the_connection_is_lost(
    board: Board, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Connection.converse
    digests = {file.sha256 for file in board.assemble(bundle)("laptop", PYTHON).kit.version_files}

    def cut_when_installing() -> None:
        wait_for(lambda: digests <= {path.name for path in (board.prefix / "files").iterdir()})
        cut_ssh()

    def converse(self: Connection, command: Sequence[str], start: str, answer: Answer, *, limit_s: float) -> str:
        def answer_and_cut(lacking: str) -> Iterator[bytes]:
            yield from answer(lacking)
            threading.Thread(target=cut_when_installing, daemon=True).start()

        return whole(self, command, start, answer_and_cut, limit_s=limit_s)

    monkeypatch.setattr(Connection, "converse", converse)
    with pytest.raises(UnreachableError, match="connection was lost"):
        board.deploy(bundle)
    monkeypatch.setattr(Connection, "converse", whole)
    wait_for((board.prefix / "current").exists)
    wait_for(lambda: not is_locked(board.prefix / "installing.lock"))
    again = board.deploy(bundle)
    assert (again.changed, again.sent_bytes) == (False, 0)
    assert ask(board.prefix) == "one"


def test_a_board_with_another_processor_is_refused_before_a_kit_is_made(board: Board, bundle: Path) -> None:
    with pytest.raises(IncompatibleError, match=f"the board is {platform.machine()}, and --board pi-4 is aarch64"):
        deploy(board.target, board.where, board.assemble(bundle), DeployOptions("pi-4"), Progress(quiet=True))


def test_waiting_for_a_unit_needs_one(board: Board, bundle: Path) -> None:
    with pytest.raises(NotFoundError, match=f"no unit is installed in {board.prefix}; add --service NAME"):
        board.deploy(bundle, waits_healthy=True)


@pytest.fixture
def run(board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`run(*arguments)` of `edgetune deploy`: exit code, standard output, standard error."""

    def assemble(bundle: Path, _board: str, *_options: object) -> AssembledKit:
        return board.make.assembled(contents(bundle), with_fields())

    monkeypatch.setattr("edgetune.delivery.kit.make.assemble", assemble)
    monkeypatch.setenv("XDG_CACHE_HOME", str(board.work / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["deploy", *map(str, arguments), "--prefix", str(board.prefix)])
        return code, *capsys.readouterr()

    return call


def test_an_inventory_has_a_line_per_board_and_fails_if_one_fails(
    board: Board, bundle: Path, run: Callable[..., Any]
) -> None:
    hosts = board.work / "hosts.txt"
    hosts.write_text(f"{board.sshd.target}\nnobody-here@127.0.0.1:{board.sshd.port}\n", encoding="utf-8")
    code, out, err = run(bundle, "--inventory", hosts, "--parallel", 2)
    assert code == 1
    assert sorted(line.split(": ")[1].split(" ")[0] for line in out.splitlines()) == ["failed", "version"]
    assert err.splitlines()[0] == "edgetune: 1 of 2 boards failed"
    assert err.splitlines()[1].startswith(f"edgetune: nobody-here@127.0.0.1:{board.sshd.port}: the login was refused")
    code, out, err = run(bundle, "--inventory", hosts, "--list", "--json")
    assert code == 1
    found = {item["host"]: item for item in map(json.loads, out.splitlines())}
    assert [item["state"] for item in found[board.sshd.target]["versions"]] == ["current"]


@pytest.fixture
def units(sshd: Sshd) -> Iterator[Path]:
    """The folder of units of a board where the user is not root, with a stand-in for systemctl."""
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import os, runpy, sys; os.geteuid = lambda: 1000; del sys.argv[0]; {run}"
    python = f'case "$1" in -I) shift; set -- -I -c "{code}" "$@" ;; esac; exec {sys.executable} "$@"'
    scripts = {"systemctl": SYSTEMCTL, "loginctl": "#!/bin/sh\necho yes\n", "python3": f"#!/bin/sh\n{python}\n"}
    for name, text in scripts.items():
        (sshd.board_programs / name).write_text(text)
        (sshd.board_programs / name).chmod(0o755)
    yield sshd.folder / ".config/systemd/user"
    for name in scripts:
        (sshd.board_programs / name).unlink()
    shutil.rmtree(sshd.folder / ".config")


def test_one_board_shows_its_progress_and_follows_a_repository(
    board: Board, bundle: Path, run: Callable[..., Any], units: Path
) -> None:
    root = Publisher(board.work / "host").root
    code, out, err = run(bundle, board.sshd.target, "--updates", "https://example.org/repo/", "--root", root)
    assert code == 0
    assert f"{board.sshd.target}: checking the board" in err
    assert " is the current one, " in out
    state = read_state(board.prefix)
    assert (state.repo, state.bundle) == ("https://example.org/repo", "home")
    assert read_trusted_root(board.prefix) == root.read_bytes()
    assert "ExecStart" in (units / "edgetune-home-update.service").read_text()
    calls = (board.sshd.board_programs / "calls").read_text()
    assert "--user enable --quiet --now edgetune-home-update.timer" in calls
    code, out, _ = run(bundle, board.sshd.target, "--json")
    assert json.loads(out)["sent_bytes"] == 0
    code, out, _ = run(bundle, board.sshd.target, "--list")
    assert (code, out.split(" ")[-1]) == (0, "current\n")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([], 2, "give one board, or several with --inventory"),
        (["pi@host", "--rollback", "--list"], 2, "--rollback and --list are given together"),
        (["pi@host", "--board", "pi-44"], 3, "no board 'pi-44'"),
        (["pi@host", "--updates", "http://x"], 2, "no root says which keys to trust; add --root FILE"),
        (["pi@host", "--port", "80"], 2, "--listen and --port are those of a unit; add --service NAME"),
        (["pi host"], 2, "'pi host' is not of the form USER@HOST"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    bundle: Path, run: Callable[..., Any], arguments: list[str], code: int, problem: str
) -> None:
    given, _, err = run(bundle, *arguments)
    assert given == code
    assert problem in err
    assert len(err.splitlines()) == 1
