from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_export.pack import check_destination, files_below, pack
from edgetune_runtime.bundle import MANIFEST_NAME, AdapterEntry, BaseEntry, Manifest, read_manifest, verify_files
from edgetune_runtime.errors import OutOfSpaceError, UsageError, VerificationError

BASE = BaseEntry("tiny", "ab" * 32, "llama", "f16", 1000, 512, 2, 256, "cd" * 32, "ef" * 32, {"gguf": "base/m.gguf"})
ADAPTER = AdapterEntry(
    "command", "lora", {"gguf": "low_rank"}, {"gguf": "adapters/command/adapter.gguf"}, BASE.fingerprint
)
MANIFEST = Manifest("home", BASE, {"command": ADAPTER}, {}, context_length=512)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    for name, text in {
        "base/m.gguf": "the base",
        "adapters/command/adapter.gguf": "an adapter",
        "adapters/command/training.png": "a plot",
        "checkpoints/step-10": "not shipped",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_bundle_holds_the_staged_files_with_their_digests(work: Path, tmp_path: Path) -> None:
    out = pack(work, tmp_path / "build" / "home", MANIFEST)
    manifest = read_manifest(out)
    assert set(manifest.files) == {
        "base/m.gguf",
        "adapters/command/adapter.gguf",
        "adapters/command/training.png",
    }
    verify_files(out, manifest)
    assert names_beside(out) == ["home"]
    assert not (out / "checkpoints").exists()


def test_files_that_are_added_to_the_filled_bundle_get_their_digests(work: Path, tmp_path: Path) -> None:
    def complete(bundle: Path, manifest: Manifest) -> Manifest:
        verify_files(bundle, read_manifest(bundle))
        assert manifest == read_manifest(bundle)
        (bundle / "README.md").write_text("a card")
        return replace(manifest, name="house")

    out = pack(work, tmp_path / "home", MANIFEST, [complete])
    manifest = read_manifest(out)
    assert (manifest.name, manifest.files["README.md"].bytes) == ("house", 6)
    verify_files(out, manifest)


def test_an_error_while_a_bundle_is_completed_leaves_the_old_one(work: Path, tmp_path: Path) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    (work / "base/m.gguf").write_text("another base")

    def complete(bundle: Path, manifest: Manifest) -> Manifest:
        raise UsageError("a row is wrong")

    with pytest.raises(UsageError, match="a row is wrong"):
        pack(work, out, MANIFEST, [complete])
    verify_files(out, read_manifest(out))
    assert (out / "base/m.gguf").read_text() == "the base"
    assert names_beside(out) == ["home", "work"]


def test_writing_into_the_bundle_reaches_no_source(work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_text("the user's own base")
    (work / "base/m.gguf").unlink()
    (work / "base/m.gguf").symlink_to(tmp_path / "mine.gguf")
    out = pack(work, tmp_path / "home", MANIFEST)
    for name in ("base/m.gguf", "adapters/command/adapter.gguf"):
        assert not (out / name).is_symlink()
        (out / name).write_text("damaged")
    assert (tmp_path / "mine.gguf").read_text() == "the user's own base"
    assert (work / "adapters/command/adapter.gguf").read_text() == "an adapter"


def test_a_bundle_is_replaced_whole(work: Path, tmp_path: Path) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    (work / "adapters/command/training.png").unlink()
    (work / "base/m.gguf").write_text("another base")
    pack(work, out, MANIFEST)
    verify_files(out, read_manifest(out))
    assert (out / "base/m.gguf").read_text() == "another base"
    assert not (out / "adapters/command/training.png").exists()
    assert names_beside(out) == ["home", "work"]


def test_an_empty_folder_may_become_a_bundle(work: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert read_manifest(pack(work, tmp_path / "home", MANIFEST)).name == "home"


def test_a_file_or_a_foreign_folder_is_never_replaced(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / MANIFEST_NAME).write_text(json.dumps({"name": "a web app"}))
    (tmp_path / "nested" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nested")
    for name in ("file", "file/x", "project", "nested", "link"):
        with pytest.raises(UsageError, match=name):
            pack(work, tmp_path / name, MANIFEST)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "project" / MANIFEST_NAME).exists()
    assert names_beside(tmp_path / "home") == ["file", "link", "nested", "project", "work"]


def test_a_bundle_with_files_of_the_users_is_not_replaced(work: Path, tmp_path: Path) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        check_destination(out)
    with pytest.raises(UsageError, match=r"notes\.txt"):
        pack(work, out, MANIFEST)
    assert (out / "notes.txt").read_text() == "mine"


def test_files_of_killed_changes_are_replaced_with_the_bundle(work: Path, tmp_path: Path) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    for name in ("adapters/extra/adapter.gguf", "states/a.state", ".manifest.json.tmp-12-13"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    pack(work, out, MANIFEST)
    assert {*files_below(out)} == {*read_manifest(out).files, MANIFEST_NAME}
    for name in ("adapters/command/notes.txt", "adapters/mine.bin", "adapters/mine/rows.csv"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
        with pytest.raises(UsageError, match=f"not part of the bundle, such as {re.escape(name)}"):
            check_destination(out)
        (out / name).unlink()


def test_the_folder_of_the_shell_is_not_replaced(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    for folder in (out, out / "adapters"):
        monkeypatch.chdir(folder)
        with pytest.raises(UsageError, match="home is the folder that you are in, or one above it, and would be"):
            check_destination(out)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    check_destination(out)


def test_nothing_is_written_into_a_bundle(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = pack(work, tmp_path / "home", MANIFEST)
    monkeypatch.chdir(home)
    for out in (home / "new", home / "adapters/new", Path("new")):
        with pytest.raises(UsageError, match=r"new is inside the bundle .*home; choose"):
            check_destination(out)
    # Other programs have files of this name too.
    (tmp_path / MANIFEST_NAME).write_text("{}", encoding="utf-8")
    check_destination(tmp_path / "new")


def test_a_name_that_leaves_no_room_for_a_temporary_one_is_refused(tmp_path: Path) -> None:
    for letters, extra in ("n", 0), ("ü", 121):
        check_destination(tmp_path / (letters * (242 - extra)))
        with pytest.raises(UsageError, match=r"has 24\d bytes, more than 242; choose a shorter one"):
            check_destination(tmp_path / (letters * (243 - extra)))


def test_a_manifest_that_names_a_missing_file_makes_no_bundle(work: Path, tmp_path: Path) -> None:
    (work / "base/m.gguf").unlink()
    with pytest.raises(VerificationError, match=r"base/m\.gguf"):
        pack(work, tmp_path / "home", MANIFEST)
    assert names_beside(work) == ["work"]


@pytest.mark.parametrize("is_set_aside", [False, True])
def test_a_failed_build_keeps_the_bundle_that_was_there_or_that_a_killed_build_set_aside(
    is_set_aside: bool, work: Path, tmp_path: Path
) -> None:
    out = pack(work, tmp_path / "home", MANIFEST)
    if is_set_aside:
        out.rename(tmp_path / f".home.old-{dead_process()}")
    (work / "base/m.gguf").unlink()
    with pytest.raises(VerificationError):
        pack(work, out, MANIFEST)
    verify_files(out, read_manifest(out))
    assert names_beside(out) == ["home", "work"]


def test_what_killed_builds_left_is_removed(work: Path, tmp_path: Path) -> None:
    dead, other = dead_process(), os.getppid()
    for name in (f".home.tmp-{dead}", f".home.tmp-{os.getpid()}", f".home.tmp-{other}", f".house.tmp-{dead}"):
        (tmp_path / name / "base").mkdir(parents=True)
    pack(work, tmp_path / "home", MANIFEST)
    assert names_beside(work) == sorted([f".home.tmp-{other}", f".house.tmp-{dead}", "home", "work"])


def test_too_small_a_disk_is_refused_before_anything_is_written(work: Path, small_disk: Path) -> None:
    with (work / "base/m.gguf").open("wb") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(OutOfSpaceError, match=r"needs 4\.2 MB, the disk has"):
        pack(work, small_disk / "home", MANIFEST)
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_bundle(
    work: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pack(work, small_disk / "home", MANIFEST)
    with (work / "base/m.gguf").open("wb") as file:
        file.truncate(3 * 2**20)
    # Another process takes the space between the check and the copy.
    monkeypatch.setattr("edgetune_export.pack.require_space", lambda *_: None)
    with pytest.raises(OutOfSpaceError, match="no space left"):
        pack(work, out, MANIFEST)
    verify_files(out, read_manifest(out))
    assert names_beside(out) == ["home"]
