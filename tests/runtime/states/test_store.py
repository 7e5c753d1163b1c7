from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from damage import flip
from edgetune_runtime import UsageError
from edgetune_runtime.formats.checked_file import read_about, read_checked, write_checked
from edgetune_runtime.states.daily import COUNT_NAME
from edgetune_runtime.states.store import KIND, StateStore, default_folder

STATE = memoryview(bytes(range(256)) * 40)


def identity(tokens: str, **changes: object) -> dict[str, object]:
    return {"engine": "llama-cpp-python 0, f16", "base": "b" * 64, "spans": [[0, []]], "tokens": tokens, **changes}


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    """A folder for three states."""
    return StateStore(tmp_path / "states", 3.5 * len(STATE) / 1e6)


def test_a_state_is_read_as_it_was_written(store: StateStore) -> None:
    assert store.load(identity("one")) is None
    assert store.save(identity("one"), STATE, "home: command", 7)
    assert store.load(identity("one")) == STATE
    (entry,) = store.entries()
    assert (entry.label, entry.tokens, entry.engine) == ("home: command", 7, "llama-cpp-python 0, f16")


@pytest.mark.parametrize("change", [{"engine": "llama-cpp-python 1, f16"}, {"base": "c"}, {"spans": [[0, [["d", 1]]]]}])
def test_another_engine_base_or_adapter_has_a_state_of_its_own(store: StateStore, change: dict[str, object]) -> None:
    store.save(identity("one"), STATE, "home", 7)
    assert store.load(identity("one", **change)) is None
    assert store.load(identity("one")) == STATE


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [*(partial(flip, place=place) for place in (0, 40, -1, -len(STATE))), cut_off])
def test_a_damaged_or_cut_off_file_is_dropped(store: StateStore, damage: Callable[[Path], None]) -> None:
    store.save(identity("one"), STATE, "home", 7)
    path = store.path_of(identity("one"))
    damage(path)
    assert store.load(identity("one")) is None
    assert not path.exists()


def head_of(path: Path) -> dict[str, object]:
    return json.loads(path.read_bytes().partition(b"\n")[0])


@pytest.mark.parametrize(
    "change",
    [
        {"about": []},
        {"about": {}},
        {"about": {"identity": []}},
        {"bytes": 10**30},
        {"bytes": 1e400},
        {"bytes": -1},
        {"bytes": True},
        {"crc32": None},
        {"about": {"identity": {"engine": 1}, "label": [], "tokens": 1e400}},
    ],
)
def test_a_file_with_another_head_is_dropped_and_does_not_keep_others_from_being_saved(
    store: StateStore, change: dict[str, object]
) -> None:
    store.save(identity("one"), STATE, "home", 7)
    path = store.path_of(identity("one"))
    path.write_bytes(json.dumps(head_of(path) | change).encode() + b"\n" + bytes(STATE))
    assert [entry.label for entry in store.entries()] in (["damaged"], ["home"])
    assert store.load(identity("one")) is None
    assert not path.exists()
    assert store.save(identity("one"), STATE, "home", 7)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.with_suffix(".other").write_bytes(path.with_suffix(".copy").read_bytes())
    path.symlink_to(path.with_suffix(".other"))


def make_sparse(path: Path) -> None:
    data = path.with_suffix(".copy").read_bytes()
    head = json.loads(data.partition(b"\n")[0]) | {"bytes": 1 << 42}
    with path.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.truncate(file.tell() + (1 << 42))


@pytest.mark.parametrize("make", [make_pipe, make_link, make_sparse])
def test_entries_of_the_store_that_are_no_files_of_their_size_are_deleted(
    store: StateStore, make: Callable[[Path], None]
) -> None:
    store.save(identity("one"), STATE, "home", 7)
    path = store.path_of(identity("one"))
    path.rename(path.with_suffix(".copy"))
    make(path)
    assert store.load(identity("one")) is None
    assert not os.path.lexists(path)
    assert store.save(identity("one"), STATE, "home", 7)
    assert store.load(identity("one")) == STATE


def test_a_folder_or_a_device_under_a_states_name_counts_as_missing(store: StateStore) -> None:
    store.path_of(identity("one")).mkdir(parents=True)
    assert store.load(identity("one")) is None
    assert not store.save(identity("one"), STATE, "home", 7)
    assert store.save(identity("two"), STATE, "home", 7)
    assert read_checked(Path("/dev/zero"), KIND) is None


def test_a_state_under_anothers_name_is_not_taken_for_it(store: StateStore) -> None:
    store.save(identity("one"), STATE, "home", 7)
    store.path_of(identity("one")).rename(store.path_of(identity("two")))
    assert store.load(identity("two")) is None


def test_a_state_that_another_user_saved_counts_as_saved(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.save(identity("one"), STATE, "home", 7)

    def refuse(_path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert store.load(identity("one")) == STATE
    assert store.save(identity("one"), STATE, "home", 7)


@pytest.mark.parametrize("uses", ["load", "save"])
def test_the_longest_unused_goes_first(store: StateStore, uses: str) -> None:
    for age, name in enumerate("abc"):
        store.save(identity(name), STATE, name, 7)
        os.utime(store.path_of(identity(name)), (age, age))
    assert store.load(identity("a")) if uses == "load" else store.save(identity("a"), STATE, "a", 7)
    store.save(identity("d"), STATE, "d", 7)
    assert {entry.label for entry in store.entries()} == {"a", "c", "d"}


def test_what_is_larger_than_the_budget_is_not_kept(tmp_path: Path) -> None:
    store = StateStore(tmp_path, len(STATE) / 2e6)
    assert not store.save(identity("one"), STATE, "home", 7)
    assert store.entries() == []


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = StateStore(tmp_path / "file" / "states", 1)
    assert not store.save(identity("one"), STATE, "home", 7)
    assert store.load(identity("one")) is None


def test_the_folder_of_another_user_keeps_nothing(unreadable: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = StateStore(unreadable, 1)
    assert store.load(identity("one")) is None
    assert not store.save(identity("one"), STATE, "home", 7)
    assert f"cannot save a state to disk: [Errno 13] Permission denied: '{unreadable}" in caplog.text


def test_clear_deletes_states_and_what_killed_writers_left_and_nothing_else(store: StateStore) -> None:
    store.save(identity("one"), STATE, "home", 7)
    (store.folder / ".abc.kv.tmp-1-1").write_bytes(b"half")
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "odd.kv").write_text("no state")
    assert {entry.label for entry in store.entries()} == {"home", "damaged"}
    assert store.clear() == 2
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


def test_a_save_deletes_what_killed_writers_left_but_not_the_files_of_writers_at_work(store: StateStore) -> None:
    store.folder.mkdir()
    left, written = store.folder / ".abc.kv.tmp-1-1", store.folder / ".abd.kv.tmp-2-2"
    for path in (left, written):
        path.write_bytes(b"half")
    hour_ago = time.time() - 3600
    os.utime(left, (hour_ago, hour_ago))
    assert store.save(identity("one"), STATE, "home", 7)
    assert not left.exists()
    assert written.exists()


def test_the_folder_is_the_users_cache_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.setenv("EDGETUNE_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("EDGETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "edgetune/states"


@pytest.mark.usefixtures("no_home")
def test_an_account_without_a_home_gives_a_folder_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no home folder; give --cache-folder, or set EDGETUNE_CACHE"):
        default_folder()
    tmp_path.chmod(0o755)
    assert StateStore(tmp_path, 1).save(identity("one"), STATE, "home", 7)


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", '{"edgetune_state": 2}\n', "\xff\n", "[" * 100_000 + "\n"])
def test_other_files_are_no_states(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="latin-1")
    assert read_checked(path, KIND) is None
    assert read_about(path, KIND) is None
    assert read_checked(tmp_path / "none", KIND) is None


def test_an_empty_state_is_one(tmp_path: Path) -> None:
    write_checked(tmp_path / "file", KIND, {"a": "é"}, memoryview(b""))
    found = read_checked(tmp_path / "file", KIND)
    assert found is not None
    assert (found.about, bytes(found.data)) == ({"a": "é"}, b"")


SIZE_MB = len(STATE) / 1e6


def files(folder: Path) -> int:
    return len(list(folder.glob("*.kv")))


def test_calls_write_only_so_much_per_day_also_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(name: str) -> bool:
        return StateStore(tmp_path, 1, 2.5 * SIZE_MB).save(identity(name), STATE, name, 7)

    assert [save(name) for name in "abcd"] == [True, True, False, False]
    # What is there already is not written again.
    before = StateStore(tmp_path, 1).path_of(identity("a")).stat()
    assert save("a")
    assert StateStore(tmp_path, 1).path_of(identity("a")).stat() == before
    StateStore(tmp_path, 1).clear()
    assert not save("a")
    tomorrow_s = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: tomorrow_s)
    assert [save(name) for name in "abc"] == [True, True, False]


def test_states_computed_ahead_are_written_however_many_calls_there_were(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "states", 1, 0)
    assert not store.save(identity("a"), STATE, "a", 7)
    assert not (tmp_path / "states").exists()
    for name in "abc":
        assert store.save(identity(name), STATE, name, 7, is_warmed=True)
    assert files(store.folder) == 3
    assert not store.save(identity("d"), STATE, "d", 7)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"edgetune_written":1,"about":{"day":[],"bytes":"x"}}\n'])
def test_a_damaged_count_is_begun_again(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / COUNT_NAME).write_bytes(damage)
    store = StateStore(tmp_path, 1, 1.5 * SIZE_MB)
    assert [store.save(identity(name), STATE, name, 7) for name in "ab"] == [True, False]


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_states_are_for_their_user_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGETUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in (tmp_path / "new", default_folder()):
        store = StateStore(folder, 1)
        if folder == default_folder():
            folder.mkdir(mode=0o755, parents=True)
            folder.chmod(0o755)
        assert store.save(identity("a"), STATE, "a", 7)
        assert rights(folder) == 0o700
        assert {rights(path) for path in folder.iterdir()} == {0o600}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_a_folder_of_the_users_own_choice_keeps_its_rights_and_others_that_can_write_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode in (0o750, 0o777):
        tmp_path.chmod(mode)
        assert StateStore(tmp_path, 1).save(identity(str(mode)), STATE, "a", 7)
        assert rights(tmp_path) == mode
        assert ("others can write to" in caplog.text) == (mode == 0o777)
