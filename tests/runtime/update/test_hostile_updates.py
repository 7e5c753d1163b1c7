"""Whatever happens to a repository or a device, an update ends in one line, a version runs, and the next one works."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from damage import flip
from edgetune_runtime.cli import main
from edgetune_runtime.errors import OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.store.kit import read_installed
from kills import full_from, left_by_kills, read_only_from
from kits import answer_of, ask, copied
from repositories import Publisher

from edgetune.delivery.publish.repository import Repository

# The environment of a kit has a stand-in for the runtime, which answers from text files.
pytestmark = pytest.mark.slow


def run(prefix: Path, *words: str) -> int:
    return main(["update", "--prefix", str(prefix), *words])


def apply(prefix: Path, publisher: Publisher) -> int:
    return run(prefix, "--apply", "--repo", str(publisher.repo), "--root", str(publisher.root))


def files_in(folder: Path, *left_out: str) -> list[str]:
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path) for path in paths if path.parts[0] not in left_out]


def test_a_flipped_bit_in_a_repository_is_refused_or_does_no_harm(
    prefix: Path, publisher: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    publisher.keys.rotate("targets")
    publisher("two")
    device, repo = tmp_path / "kept-device", tmp_path / "kept-repo"
    prefix.rename(device)
    publisher.repo.rename(repo)
    codes = {}
    for name in files_in(repo, ".lock"):
        copied(device, prefix)
        flip(copied(repo, publisher.repo) / name, 0.5)
        codes[name] = apply(prefix, publisher)
        error = capsys.readouterr().err
        assert ask(prefix) == ("zero" if codes[name] else "two")
        assert codes[name] in (0, VerificationError.exit_code) and "Traceback" not in error, (name, error)
        copied(repo, publisher.repo)
        assert apply(prefix, publisher) == 0
        assert answer_of(prefix) == "two"
    newest = ("2.root", "2.snapshot", "2.targets", "2.bundle-home", "timestamp")
    assert all(codes[f"metadata/{name}.json"] for name in newest)


def test_a_flipped_bit_on_a_device_ends_in_one_line_or_is_repaired(
    prefix: Path, publisher: Publisher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    assert apply(prefix, publisher) == 0
    publisher("two")
    kept = tmp_path / "kept"
    current = read_installed(prefix / "versions" / (prefix / "current").readlink().name)
    programs = [file.sha256 for file in current.version_files if file not in current.bundle_files]
    remedies = {
        "update/root.json": "with --root",
        "update/state.json": "restore it from a backup",
        f"versions/{current.version}/kit.json": "install the kit again",
        **{f"files/{sha256}": "install the kit again" for sha256 in programs},
    }
    prefix.rename(kept)
    for name in files_in(kept, "venvs", "current", "previous", "lock", "installing.lock"):
        copied(kept, prefix)
        flip(prefix / name, 0.5)
        code = run(prefix, "--apply")
        error = capsys.readouterr().err
        assert "Traceback" not in error, (name, error)
        assert code == 0 or remedies[name] in error, (name, error)
        assert ask(prefix) == ("one" if code else "two")


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["{blob}", "{blob}.part"])
def test_what_is_no_file_in_the_store_is_replaced(
    name: str, kind: str, prefix: Path, publisher: Publisher, tmp_path: Path
) -> None:
    publisher("one")
    blob = next(path.name for path in (publisher.repo / "blobs").iterdir() if path.read_bytes() == b"one")
    target = prefix / "files" / name.format(blob=blob)
    other = tmp_path / "other"
    other.write_bytes(b"one" if name == "{blob}" else b"o")
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(other if kind == "link" else tmp_path / "none")
    assert apply(prefix, publisher) == 0
    assert ask(prefix) == "one"
    installed = prefix / "files" / blob
    assert installed.is_file() and not installed.is_symlink()
    assert other.read_bytes() == (b"one" if name == "{blob}" else b"o") and not (tmp_path / "none").exists()


def test_a_first_update_that_is_killed_at_any_write_can_be_run_again(
    prefix: Path, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a kit, a version runs in the environment of the Python that updates.
    monkeypatch.setattr(sys, "executable", str(prefix / "current/venv/bin/python"))
    publisher("one")
    new, count = tmp_path / "new", 0
    for count, _ in enumerate(left_by_kills(lambda: apply(new, publisher), new)):
        # Most writes are those of a device with a kit, of which test_update.py tries each.
        if count % 3 == 0:
            if (new / "current").exists():
                assert ask(new) == "one"
            assert apply(new, publisher) == 0
            assert answer_of(new) == "one"
    assert count > 30


@pytest.mark.parametrize(("failing", "expected"), [(full_from, OutOfSpaceError), (read_only_from, UsageError)])
def test_a_rollback_where_nothing_can_be_written_leaves_a_version_running(
    failing: type, expected: type, prefix: Path, publisher: Publisher, tmp_path: Path
) -> None:
    for answer in ("one", "two"):
        publisher(answer)
        assert apply(prefix, publisher) == 0
    kept = tmp_path / "kept"
    prefix.rename(kept)
    for write in range(1, 100, 3):
        copied(kept, prefix)
        code = failing(write, lambda: run(prefix, "--rollback"))
        answer = ask(prefix)
        assert answer in ("one", "two")
        if answer == "two" or (prefix / ".rollback").is_symlink():
            assert run(prefix, "--rollback") == 0
        assert answer_of(prefix) == "one"
        if code == 0:
            break
        assert code == expected.exit_code
    assert write > 5


def test_a_state_that_is_no_file_is_not_waited_for(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    assert apply(prefix, publisher) == 0
    state = prefix / "update/state.json"
    state.unlink()
    os.mkfifo(state)
    assert run(prefix, "--status") == UsageError.exit_code
    assert f"{state} is not a regular file; check the disk" in capsys.readouterr().err


def test_the_status_is_shown_where_nothing_can_be_written(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    assert apply(prefix, publisher) == 0
    assert read_only_from(1, lambda: run(prefix, "--status")) == 0


def test_a_repository_that_loses_a_bundle_is_refused(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    assert apply(prefix, publisher) == 0
    repository = Repository(publisher.repo, publisher.keys)
    del repository._roles["bundle-home"]
    repository.commit(expires_days=30)
    assert apply(prefix, publisher) == VerificationError.exit_code
    assert "New snapshot is missing info for 'bundle-home.json'" in capsys.readouterr().err
    assert ask(prefix) == "one"


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a/../../x", "a//b", "./a", "a/", "", "a\\b", "\x1b[2J", "x" * 5000, "answer.txt/x"]
)
def test_a_release_with_a_path_that_no_bundle_has_is_refused(
    path: str, prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    release = publisher("one").release
    raw = json.loads(release.to_json())
    raw["files"][path] = raw["files"]["answer.txt"]
    repository = Repository(publisher.repo, publisher.keys)
    repository.put_release("home", "home/stable.json", json.dumps(raw).encode(), 2)
    repository.commit(expires_days=30)
    assert apply(prefix, publisher) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error
    assert any(reason in error for reason in ("outside the bundle", "too long", "a file in place of a folder"))
    assert ask(prefix) == "zero"
