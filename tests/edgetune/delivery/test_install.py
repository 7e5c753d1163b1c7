"""Installs of kits on this machine, in place of a board."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip
from edgetune_runtime import cli
from edgetune_runtime.errors import BusyError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import INSTALLING_NAME, installing
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME, KitFile, read_kit, wheels_id
from kits import PYTHON, KitMaker, answer_of, ask, install_sh, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")]


@pytest.fixture(scope="module")
def kits(make: KitMaker) -> tuple[Path, Path, Path]:
    """Three kits of the same wheels that answer one, two and three."""
    return make("one"), make("two"), make("three")


@pytest.fixture(scope="module")
def installed(kits: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with the first kit."""
    prefix = tmp_path_factory.mktemp("board") / "home"
    done = install_sh(kits[0], "--prefix", str(prefix))
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture
def prefix(installed: Path, tmp_path: Path) -> Path:
    """A copy of it, with its hard links."""
    copy = tmp_path / "home"
    subprocess.run(["cp", "-a", str(installed), str(copy)], check=True)
    (copy / "bin/edgetune-run").write_text((copy / "bin/edgetune-run").read_text().replace(str(installed), str(copy)))
    return copy


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and contents of everything in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.lstat().st_mtime_ns, contents(path)) for path in paths
    }


def contents(path: Path) -> bytes:
    return str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()


def names(prefix: Path, folder: str) -> set[str]:
    return {path.name for path in (prefix / folder).iterdir()}


def test_an_installed_kit_runs(installed: Path, kits: tuple[Path, Path, Path]) -> None:
    assert ask(installed) == "one"
    assert versions.linked(installed, "current") == read_kit(kits[0]).version
    (mark,) = installed.glob("venvs/*/complete")
    assert names(mark.parent, ".") >= {"bin", "lib"} and not (mark.parent / "wheels").exists()


def test_a_second_install_writes_nothing(prefix: Path, kits: tuple[Path, Path, Path]) -> None:
    before = state(prefix)
    done = install_sh(kits[0], "--prefix", str(prefix), "--json")
    assert json.loads(done.stdout) == {"version": read_kit(kits[0]).version, "changed": False, "warnings": []}
    assert state(prefix) == before


def test_a_new_version_shares_unchanged_files_and_the_environment(prefix: Path, kits: tuple[Path, Path, Path]) -> None:
    before = state(prefix)
    assert run("install", kits[1], "--prefix", prefix) == 0
    assert ask(prefix) == "two"
    first, second = (prefix / "versions" / read_kit(kit).version for kit in kits[:2])
    assert (second / "bundle/base/model.gguf").samefile(first / "bundle/base/model.gguf")
    assert {name for name in state(prefix).keys() - before.keys() if name.startswith("venvs")} == set()


def test_the_version_before_is_kept_and_older_ones_are_removed(prefix: Path, kits: tuple[Path, Path, Path]) -> None:
    assert run("install", kits[1], "--prefix", prefix) == 0
    assert run("install", kits[2], "--prefix", prefix) == 0
    assert names(prefix, "versions") == {read_kit(kit).version for kit in kits[1:]}
    kept = {file.sha256 for kit in kits[1:] for file in read_kit(kit).version_files}
    assert names(prefix, "files") == kept
    assert run("rollback", "--prefix", prefix) == 0
    assert ask(prefix) == "two"
    assert run("rollback", "--prefix", prefix) == 0
    assert ask(prefix) == "three"


def test_the_program_in_the_prefix_knows_its_prefix(
    prefix: Path, kits: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", kits[1], "--prefix", prefix) == 0
    program = [sys.executable, "-I", str(prefix / "current/board.pyz")]
    listed = json.loads(subprocess.run([*program, "list", "--json"], capture_output=True, check=True).stdout)
    expected = [(read_kit(kits[1]).version, "current"), (read_kit(kits[0]).version, "previous")]
    assert [(item["version"], item["state"]) for item in listed] == expected
    subprocess.run([*program, "rollback"], check=True, capture_output=True)
    assert ask(prefix) == "one"


def test_errors_of_the_system_are_one_line(installed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--kit", "a" * 300) == 2
    assert capfd.readouterr().err.endswith(": File name too long; check the path and its permissions\n")
    listing = [sys.executable, "-I", str(installed / "current/board.pyz"), "list"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(listing, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        6, "edgetune-board: no space left to write to the disk; free some space and run the command again\n",
    )  # fmt: skip


def test_a_version_that_answers_differently_does_not_become_the_current_one(
    prefix: Path, make: KitMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", make("wrong"), "--prefix", prefix) == 4
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("edgetune-board: version ") and "1 of 1 adapters answer differently" in told
    assert ask(prefix) == "one"
    assert versions.linked(prefix, "previous") is None
    assert run("install", make("two"), "--prefix", prefix) == 0
    assert ask(prefix) == "two"
    assert len(names(prefix, "versions")) == 2


def test_a_version_that_crashes_does_not_become_the_current_one(
    prefix: Path, make: KitMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = make("crash")
    assert run("install", kit, "--prefix", prefix) == 4
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"edgetune-board: version {read_kit(kit).version} fails its check: it was ended by SIGABRT: "
        "x.cpp:7: GGML_ASSERT(n > 0) failed; the previous version still runs"
    )
    assert answer_of(prefix) == "one"


def test_a_bundle_without_golden_answers_is_installed_and_says_so(
    prefix: Path, make: KitMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("install", make("unknown"), "--prefix", prefix) == 0
    assert "no golden answers" in capfd.readouterr().err
    assert ask(prefix) == "unknown"


def test_files_that_the_kit_lacks_come_from_the_store(
    prefix: Path, kits: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    sent = tmp_path / "incoming"
    sent.mkdir()
    for name in (KIT_NAME, SUMS_NAME):
        shutil.copyfile(kits[1] / name, sent / name)
    assert run("install", sent, "--prefix", prefix) == 3
    for file in read_kit(kits[1]).version_files:
        shutil.copyfile(kits[1] / file.path, prefix / "files" / file.sha256)
    assert run("install", sent, "--prefix", prefix) == 0
    assert ask(prefix) == "two"


@pytest.mark.parametrize(
    "path", ["bundle/answer.txt", "bundle/manifest.json", "board.pyz", "install.sh", KIT_NAME, SUMS_NAME, "wheels"]
)
def test_a_tampered_kit_is_refused_and_the_old_version_runs(
    path: str, prefix: Path, kits: tuple[Path, Path, Path], make: KitMaker, tmp_path: Path
) -> None:
    # A wheel is read where it is not installed yet; the environment of the others is there, which saves two seconds.
    kit = Path(shutil.copytree(make("new", runtime="2") if path == "wheels" else kits[1], tmp_path / "kit"))
    file = kit / path if path != "wheels" else next((kit / path).glob("edgetune*"))
    # In a comment of the script, so that it still runs.
    flip(file, 15 if path == "install.sh" else 0.5)
    done = install_sh(kit, "--prefix", str(prefix))
    assert done.returncode in {4, 5}
    assert len([line for line in done.stderr.splitlines() if "copy the kit again" in line]) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert answer_of(prefix) == "one"


def test_damaged_files_of_an_installed_version_are_repaired_for_all_versions(
    prefix: Path, kits: tuple[Path, Path, Path]
) -> None:
    assert run("install", kits[1], "--prefix", prefix) == 0
    for name in ("answer.txt", "base/model.gguf"):
        path = prefix / "current/bundle" / name
        path.chmod(0o644)
        path.write_bytes(b"x" * path.stat().st_size)
    (prefix / "current/kit.json").write_bytes(b"\xff")
    models = [prefix / link / "bundle/base/model.gguf" for link in ("current", "previous")]
    assert [model.read_bytes() == b"weights" for model in models] == [False, False]
    assert run("install", kits[1], "--prefix", prefix) == 0
    assert ask(prefix) == "two"
    assert [model.read_bytes() for model in models] == [b"weights"] * 2


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b'{"schema": 99}', b'{"schema": 1, "name": 5}'])
def test_a_damaged_description_of_the_version_before_is_said_and_left_out(
    damage: bytes, prefix: Path, kits: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (read_kit(kit).version for kit in kits)
    assert run("install", kits[1], "--prefix", prefix) == 0
    (prefix / "previous/kit.json").write_bytes(damage)
    capfd.readouterr()
    assert run("list", "--prefix", prefix, "--json") == 0
    listed, told = capfd.readouterr()
    assert [item["version"] for item in json.loads(listed)] == [second]
    assert f"version {first} is left out: " in told and len(told.splitlines()) == 1
    assert run("rollback", "--prefix", prefix) in {3, 4}
    assert run("install", kits[1], "--prefix", prefix) == 0
    assert names(prefix, "versions") == {first, second}
    assert run("install", kits[2], "--prefix", prefix) == 0
    assert ask(prefix) == "three"
    assert names(prefix, "versions") == {second, third}
    assert run("uninstall", "--prefix", prefix) == 0


def changed(**needs: object) -> Callable[[bytes], bytes]:
    """A change of kit.json: of its needs, or of top-level keys that it has."""

    def change(text: bytes) -> bytes:
        raw = json.loads(text)
        for key, value in needs.items():
            (raw if key in raw else raw["needs"])[key] = value
        raw["wheels"] = wheels_id(raw["python"], [KitFile(**file) for file in raw["files"]])
        return json.dumps(raw).encode()

    return change


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        ({"machine": "riscv64"}, "the kit is for riscv64"),
        ({"python": "3.99"}, "the kit's wheels are for Python 3.99"),
        ({"instructions": ["asimd2"]}, "this processor lacks asimd2"),
        ({"glibc": "2.999"}, "the kit's wheels need 2.999"),
        ({"ram_mb": 10**9}, "the bundle needs at least 1000000000 MB of memory"),
        ({"schema": 99}, "has schema 99"),
        ({"name": "../home"}, "name is '../home'"),
        ({"files": [{"path": "bundle/../../x", "sha256": "0" * 64, "bytes": 1}]}, "outside the bundle"),
    ],
)
def test_a_kit_that_does_not_fit_this_machine_is_refused_in_one_line(
    needs: dict[str, object], told: str, prefix: Path, make: KitMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = make("new", change=changed(**needs))
    assert run("install", kit, "--prefix", prefix) in {4, 5}
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line and "; " in line
    assert answer_of(prefix) == "one"


def test_a_kit_with_more_packages_than_the_disk_has_space_for_is_refused(
    prefix: Path, make: KitMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    kit = make("new", runtime="3", change=changed(packages_mb=10**9))
    assert run("install", kit, "--prefix", prefix) == IncompatibleError.exit_code
    assert "of disk" in capfd.readouterr().err


def test_pip_reads_the_copies_that_were_compared(prefix: Path, make: KitMaker, tmp_path: Path) -> None:
    kit = Path(shutil.copytree(make("new", runtime="4"), tmp_path / "kit"))
    read = read_kit(kit)
    wheel = next(file for file in read.wheel_files if file.name.startswith("edgetune"))
    # Whoever can write to the kit changes it while the environment is made, after its wheels were compared.
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho > "{kit / wheel.path}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    code = (
        "import sys; from edgetune.delivery.board.main import main; sys.executable = sys.argv.pop(1); sys.exit(main())"
    )
    words = [sys.executable, "-c", code, str(python), "install", str(kit), "--prefix", str(prefix)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (kit / wheel.path).read_bytes() == b"\n"
    assert ask(prefix) == "new"
    assert not {file.sha256 for file in read.wheel_files} & names(prefix, "files")


def test_a_clock_at_1970_is_refused(
    prefix: Path, kits: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.time", lambda: 100.0)
    assert run("install", kits[1], "--prefix", prefix) == 5
    assert "the clock says" in capfd.readouterr().err
    assert answer_of(prefix) == "one"


def test_a_python_that_the_kit_has_no_wheels_for_is_refused_by_the_script(
    prefix: Path, kits: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", f"python3.{sys.version_info.minor}"):
        (programs / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit\nexit 1\n')
        (programs / name).chmod(0o755)
    script = kits[1] / "install.sh"
    text = script.read_text().replace("in /usr/bin/python3 ", "in ")
    changed = tmp_path / "install.sh"
    changed.write_text(text)
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", changed], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1)
    assert "Python 3.8.1" in done.stderr and "--python" in done.stderr


def test_the_script_finds_its_folder_with_a_cdpath(kits: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kit, prefix = kits[0], tmp_path / "home"
    command = ["sh", f"{kit.name}/install.sh", "check", "--prefix", str(prefix), "--json"]
    environment = {**os.environ, "CDPATH": str(kit.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=kit.parent, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["problems"] == []


def test_a_system_of_32_bits_is_refused_by_the_script(kits: tuple[Path, Path, Path], tmp_path: Path) -> None:
    getconf = tmp_path / "getconf"
    getconf.write_text("#!/bin/sh\necho 32\n")
    getconf.chmod(0o755)
    done = install_sh(kits[1], variables={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "32 bits" in done.stderr


def test_two_installs_at_once_are_refused(
    prefix: Path, kits: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with installing(prefix):
        assert run("install", kits[1], "--prefix", prefix) == BusyError.exit_code
    assert "another command" in capfd.readouterr().err
    assert answer_of(prefix) == "one"


def test_uninstall_leaves_nothing_but_the_files_of_others(prefix: Path, kits: tuple[Path, Path, Path]) -> None:
    (prefix / "notes").write_text("mine")
    assert install_sh(kits[0], "uninstall", "--prefix", str(prefix)).returncode == 0
    assert names(prefix, ".") == {"notes"}
    assert install_sh(kits[0], "uninstall", "--prefix", str(prefix)).returncode == 3


def test_uninstall_removes_what_a_deploy_that_was_cut_left(tmp_path: Path) -> None:
    for folder in ("files", "incoming"):
        (tmp_path / "home" / folder).mkdir(parents=True)
    # Those of another program.
    assert run("uninstall", "--prefix", tmp_path / "home") == NotFoundError.exit_code
    (tmp_path / "home" / INSTALLING_NAME).touch()
    assert run("uninstall", "--prefix", tmp_path / "home") == 0
    assert not (tmp_path / "home").exists()
    assert run("uninstall", "--prefix", tmp_path / "home") == NotFoundError.exit_code


@pytest.mark.parametrize("keys", ["keys", "keys/root.pem"])
def test_uninstall_leaves_what_others_have_under_the_names_of_its_own(keys: str, tmp_path: Path) -> None:
    mine = {tmp_path / name for name in (keys, "incoming/metadata/notes.txt", f"versions/{'a' * 16}")}
    for path in (tmp_path / INSTALLING_NAME, *mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".current.new").symlink_to(f"versions/{'b' * 16}")
    if keys != "keys":
        (tmp_path / "service.json").touch()
    assert run("uninstall", "--prefix", tmp_path) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_dir()} == mine


def test_the_files_of_others_stay_in_a_folder_that_has_what_an_install_writes(
    installed: Path, kits: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "home"
    folders = ("versions/old", "venvs/work", "files", "files/pictures", "update", "incoming")
    mine = [prefix / folder / name for folder in folders for name in ("notes.txt", "film.part")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert run("uninstall", "--prefix", prefix) == NotFoundError.exit_code
    subprocess.run(["cp", "-a", f"{installed}/.", str(prefix)], check=True)
    assert run("install", kits[1], "--prefix", prefix) == 0
    assert ask(prefix) == "two"
    assert run("uninstall", "--prefix", prefix) == 0
    assert {path for path in prefix.rglob("*") if path.is_file()} == {*mine}
    (prefix / "current").symlink_to("versions/old")
    assert run("install", kits[1], "--prefix", prefix) == UsageError.exit_code
    assert "is not a link to a version; choose another --prefix" in capfd.readouterr().err
    assert {path for path in prefix.rglob("*") if path.is_file()} == {*mine, prefix / INSTALLING_NAME}
    assert run("uninstall", "--prefix", prefix) == 0
    assert (prefix / "current").readlink() == Path("versions/old")


def test_the_program_of_another_install_is_neither_replaced_nor_deleted(
    kits: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "bin/edgetune-run"
    mine.parent.mkdir()
    mine.write_text("#!/usr/bin/python3\n")
    assert run("install", kits[0], "--prefix", tmp_path) == UsageError.exit_code
    assert f"{mine} is not that of an install; choose another --prefix, or move it away" in capfd.readouterr().err
    assert run("uninstall", "--prefix", tmp_path) == 0
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {mine: "#!/usr/bin/python3\n"}


def test_settings_of_pip_do_not_disturb(make: KitMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/pip.conf").write_text("[install]\nuser = true\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert run("install", make("one"), "--prefix", tmp_path / "home") == 0
    assert ask(tmp_path / "home") == "one"


def test_another_python_can_still_uninstall(prefix: Path, kits: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kit = Path(shutil.copytree(kits[0], tmp_path / "kit"))
    script = (kit / "install.sh").read_text()
    (kit / "install.sh").write_text(script.replace(PYTHON, "3.99"))
    assert "no Python 3.99 here" in install_sh(kit, "--prefix", str(prefix)).stderr
    assert install_sh(kit, "list", "--prefix", str(prefix)).stdout.count("current") == 1
    assert install_sh(kit, "uninstall", "--prefix", str(prefix)).returncode == 0
    assert not prefix.exists()


def test_the_default_prefix_is_named_after_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert versions.default_prefix("home") == tmp_path / "edgetune/home"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert versions.default_prefix("home") == Path("/opt/edgetune/home")


@pytest.mark.parametrize("command", ["install", "uninstall", "update"])
def test_an_empty_prefix_is_not_the_current_folder(
    command: str,
    kits: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(UsageError.exit_code)):
        if command == "update":
            cli.main(["update", "--apply", "--prefix", ""])
        else:
            run(command, *kits[: command == "install"], "--prefix", "")
    assert "argument --prefix: invalid directory value: ''; see " in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_reports_facts_and_problems(make: KitMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kit = make("new", change=changed(ram_mb=10**9, glibc="2.999"))
    assert run("check", "--kit", kit, "--prefix", tmp_path / "none", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["bits"] == 64 and found["ram_mb"] > 100 and found["disk_mb"] > 0
    assert [item["message"].split()[0] for item in found["problems"]] == ["glibc", "the"]
    assert run("check", "--kit", kit, "--prefix", tmp_path / "none") == 5
    assert not (tmp_path / "none").exists()


def test_check_reads_a_kit_json_as_install_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "kit.json"
    listed.write_bytes(b"\xff")
    assert run("check", "--kit", listed) == VerificationError.exit_code
    assert "is damaged: it is not UTF-8; copy the kit again" in capsys.readouterr().err
    listed.unlink()
    os.mkfifo(listed)
    assert run("check", "--kit", listed) == VerificationError.exit_code
    assert "is not a regular file" in capsys.readouterr().err
