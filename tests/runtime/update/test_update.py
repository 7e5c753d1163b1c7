from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import AdapterEntry, GoldenAnswer, read_manifest
from edgetune_runtime.cli import main
from edgetune_runtime.errors import (
    BusyError,
    EdgetuneError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from edgetune_runtime.store import acknowledgement
from edgetune_runtime.store.durable import installing, locked
from edgetune_runtime.store.in_use import VersionsInUse
from edgetune_runtime.update import current, trust, update
from edgetune_runtime.update.download import download
from edgetune_runtime.update.state import read_state, text_of_state, write_state
from edgetune_runtime.update.update import UpdateSource
from kills import full_from, left_by_kills, read_only_from
from kits import KitMaker, answer_of, ask, copied, write_bundle
from repositories import Publisher, Server, publish, serving, silent

from edgetune.delivery.board import main as board

# The environment of a kit has a stand-in for the runtime, which answers from text files.
pytestmark = pytest.mark.slow
NOTHING = UpdateSource()


def apply(prefix: Path, source: UpdateSource = NOTHING) -> bool:
    return update.apply(prefix, source, silent)[1]


def source_of(publisher: Publisher, where: Server | Path) -> UpdateSource:
    return UpdateSource(repo=where.url if isinstance(where, Server) else str(where), root=publisher.root)


def test_an_update_downloads_what_has_changed_and_switches(prefix: Path, publisher: Publisher, server: Server) -> None:
    found = update.check(prefix, source_of(publisher, server))
    assert found.to_json() == {
        "name": "home", "channel": "stable", "release": 1, "available": True, "refused": None, "held_back": None
    }  # fmt: skip
    assert ask(prefix) == "zero"
    assert apply(prefix)
    assert ask(prefix) == "one"
    server.requests.clear()
    publisher("two")
    assert apply(prefix)
    assert ask(prefix) == "two"
    # The answer, the manifest and its signature: the base is there.
    assert sum(path.startswith("blobs/") for path in server.requests) == 3
    assert len(server.requests) > 5 and server.connections == 3
    listed = current.status(prefix, silent)
    assert [(item["state"], item["release"]) for item in listed["versions"]] == [("current", 2), ("previous", 1)]
    assert (listed["repo"], listed["name"], listed["channel"]) == (server.url, "home", "stable")


def test_a_device_that_is_up_to_date_makes_one_small_request(
    prefix: Path, publisher: Publisher, server: Server
) -> None:
    assert apply(prefix, source_of(publisher, server))
    server.requests.clear()
    server.sent.clear()
    assert not apply(prefix)
    assert server.requests == ["metadata/timestamp.json"]
    assert sum(server.sent) < 4000


def test_an_update_does_not_replace_the_program_of_another_install(publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    mine = tmp_path / "home/bin/edgetune-run"
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    with pytest.raises(UsageError, match="edgetune-run is not that of an install"):
        apply(tmp_path / "home", source_of(publisher, publisher.repo))
    assert mine.read_text() == ""


def adapter(name: str, data: bytes, answer: str, publisher: Publisher) -> None:
    file = f"adapters/{name}/adapter.gguf"
    path = publisher.bundle / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    golden = GoldenAnswer(f"What does {name} say, and why? " * 40, f"{name} says {answer}", 20)
    entry = AdapterEntry(name, "lora", {"gguf": "low_rank"}, {"gguf": file}, "ab" * 32, golden={"gguf": golden})
    publisher.adapters[name] = entry


def test_only_the_changed_adapter_of_many_is_downloaded(prefix: Path, publisher: Publisher, server: Server) -> None:
    for number in range(100):
        adapter(f"task-{number}", b"%d" % number, "yes", publisher)
    publisher("two")
    assert apply(prefix, source_of(publisher, server))
    assert sum(server.sent) > 200_000
    # Also without the release that the device has read, as after an install from a kit.
    for data, forgotten in ((b"new" * 50_000, "none"), (b"old" * 50_000, "release.json")):
        adapter("task-50", data, data[:3].decode(), publisher)
        publisher("two")
        (prefix / "update/metadata" / forgotten).unlink(missing_ok=True)
        server.sent.clear()
        assert apply(prefix)
        assert (prefix / "current/bundle/adapters/task-50/adapter.gguf").read_bytes() == data
        assert 150_000 < sum(server.sent) < 150_000 + 32_000
    publisher("three")
    for path in (publisher.repo / "pieces").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(VerificationError, match="is refused"):
        apply(prefix)
    # A mirror that has not all of it.
    shutil.rmtree(publisher.repo / "pieces")
    assert apply(prefix)
    assert ask(prefix) == "three"


def installed_files(prefix: Path) -> set[str]:
    bundle = prefix / "current/bundle"
    return {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}


def test_a_device_downloads_the_format_that_it_opens(prefix: Path, publisher: Publisher, server: Server) -> None:
    publisher.formats = ["onnx", "gguf"]
    publisher("two")
    assert apply(prefix, source_of(publisher, server))
    assert ask(prefix) == "two"
    assert installed_files(prefix) == {"manifest.json", "manifest.json.sig", "answer.txt", "base/model.gguf"}
    assert list(read_manifest(prefix / "current/bundle").base.files) == ["gguf"]
    assert not apply(prefix)
    # What was left out is downloaded when it is wanted, also of the same release.
    assert apply(prefix, UpdateSource(formats=("onnx", "gguf")))
    assert "base/onnx/model.onnx" in installed_files(prefix)
    publisher("three")
    assert apply(prefix)
    assert "base/onnx/model.onnx" in installed_files(prefix)
    assert current.status(prefix, silent)["versions"][0]["engines"] == ["gguf", "onnx"]
    with pytest.raises(IncompatibleError, match=r"opens gguf, and the formats to download are onnx; add gguf"):
        apply(prefix, UpdateSource(formats=("onnx",)))
    publisher("four")
    with pytest.raises(IncompatibleError, match=r"release 4 of home has no files for ggml; use --formats onnx,gguf"):
        apply(prefix, UpdateSource(formats=("ggml",)))
    assert read_state(prefix).formats == ("onnx", "gguf")
    assert main(["update", "--check", "--prefix", str(prefix), "--formats", "gguf, onnx,"]) == 0
    assert read_state(prefix).formats == ("gguf", "onnx")
    assert main(["update", "--apply", "--prefix", str(prefix), "--formats", ""]) == 0
    assert (ask(prefix), read_state(prefix).formats) == ("four", ())


def test_a_device_that_tried_another_channel_gets_the_next_release_of_the_one_before(
    prefix: Path, publisher: Publisher
) -> None:
    publisher("one")
    publisher("two", channel="beta")
    assert apply(prefix, replace(source_of(publisher, publisher.repo), channel="beta"))
    with pytest.raises(VerificationError, match="and the newest in stable; if it had another channel before, wait"):
        apply(prefix, UpdateSource(channel="stable"))
    publisher("three")
    assert apply(prefix, UpdateSource(channel="stable"))
    assert ask(prefix) == "three"


def test_a_device_without_a_kit_gets_all_formats_or_those_that_it_names(
    publisher: Publisher, both_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(both_of("llama"), tmp_path / "real"))
    publish(bundle, publisher.repo, publisher.keys)
    for formats in (None, ("onnx",)):
        prefix = tmp_path / f"device-{formats}"
        assert apply(prefix, replace(source_of(publisher, publisher.repo), formats=formats))
        assert current.status(prefix, silent)["versions"][0]["engines"] == [*(formats or ("gguf", "onnx"))]
        with Runtime.open(prefix / "current/bundle") as runtime:
            assert runtime.generate("turn on", adapter="command", max_tokens=3).text
            assert list(runtime.manifest.base.files) == [*(formats or ("gguf", "onnx"))]


def test_a_repository_can_be_a_folder_that_is_found_again(
    prefix: Path, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher("one")
    monkeypatch.chdir(publisher.repo.parent)
    assert apply(prefix, source_of(publisher, Path("repo")))
    assert ask(prefix) == "one"
    publisher("two")
    monkeypatch.chdir(tmp_path)
    assert apply(prefix)
    assert ask(prefix) == "two"


def test_the_script_of_a_prefix_says_which_one_it_is(installed: Path) -> None:
    script = (installed / "bin/edgetune-run").read_text().replace('exec "$version/venv/bin/python"', "exec env #")
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"EDGETUNE_PREFIX={installed}" in shown.splitlines()


@pytest.mark.parametrize("answer", ["wrong", "crash"])
def test_a_version_that_fails_its_trial_is_tried_twice_and_then_left_out(
    answer: str, prefix: Path, publisher: Publisher, server: Server
) -> None:
    publisher(answer)
    for source in (source_of(publisher, server), NOTHING):
        with pytest.raises(VerificationError, match="fails its check"):
            apply(prefix, source)
        assert ask(prefix) == "zero"
    server.requests.clear()
    found, changed = update.apply(prefix, NOTHING, silent)
    assert (found.to_json()["refused"], changed) == ("it failed its check 2 times", False)
    assert server.requests == ["metadata/timestamp.json"]
    publisher("two")
    assert apply(prefix)
    assert ask(prefix) == "two"


def test_a_version_that_a_process_has_open_is_deleted_after_it_was_closed(prefix: Path, publisher: Publisher) -> None:
    opened, in_use = (prefix / "current/bundle").resolve(), VersionsInUse()
    in_use.use([opened])
    for answer, is_there in (("one", True), ("two", True), ("three", False)):
        if not is_there:
            in_use.use(())
        publisher(answer)
        assert apply(prefix, source_of(publisher, publisher.repo))
        assert (opened / "answer.txt").exists() == is_there
    assert len(list((prefix / "versions").iterdir())) == 2


def test_a_bundle_that_was_gone_back_from_is_left_out_until_a_newer_one(
    prefix: Path, publisher: Publisher, server: Server
) -> None:
    apply(prefix, source_of(publisher, server))
    publisher("two")
    apply(prefix)
    current.roll_back(prefix, "this device went back from it", silent)
    assert ask(prefix) == "one"
    assert not apply(prefix)
    assert update.check(prefix, NOTHING).reason == "this device went back from it"
    assert ask(prefix) == "one"
    publisher("three")
    assert apply(prefix)
    current.roll_back(prefix, "it was marked as bad", silent)
    assert ask(prefix) == "one"
    current.roll_back(prefix, "this device went back from it", silent)
    assert ask(prefix) == "three"
    assert update.check(prefix, NOTHING).reason is None


def test_a_kit_and_updates_follow_each_other(
    prefix: Path, publisher: Publisher, server: Server, tmp_path: Path
) -> None:
    apply(prefix, source_of(publisher, server))
    assert board.main(["rollback", "--prefix", str(prefix)]) == 0
    assert ask(prefix) == "zero"
    assert not apply(prefix)
    assert update.check(prefix, NOTHING).reason == "this device went back from it"
    publisher("two")
    (tmp_path / "kits").mkdir()
    assert board.main(["install", str(KitMaker(tmp_path / "kits")("kit")), "--prefix", str(prefix)]) == 0
    assert ask(prefix) == "kit"
    assert apply(prefix)
    assert ask(prefix) == "two"


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_download_that_is_cut_off_goes_on(
    ignores_ranges: bool, prefix: Path, publisher: Publisher, server: Server
) -> None:
    (publisher.bundle / "base").mkdir(exist_ok=True)
    big = publisher.bundle / "base/big.bin"
    big.write_bytes(bytes(range(256)) * 4000)
    publisher("two")
    server.cut_after, server.ignores_ranges = 300_000, ignores_ranges
    if ignores_ranges:
        # A server that always ends at the same byte never gets further.
        with pytest.raises(UnreachableError, match="of 1024000 bytes"):
            apply(prefix, source_of(publisher, server))
        assert ask(prefix) == "zero"
        server.cut_after = None
        assert apply(prefix)
    else:
        assert apply(prefix, source_of(publisher, server))
    assert ask(prefix) == "two"
    assert (prefix / "current/bundle/base/big.bin").read_bytes() == big.read_bytes()


def blob_of(publisher: Publisher, answer: str) -> str:
    return next(path.name for path in (publisher.repo / "blobs").iterdir() if path.read_bytes() == answer.encode())


@pytest.mark.parametrize("data", [b"owe", b"on", b"one" * 1000])
def test_bytes_that_were_not_signed_are_refused_and_the_old_version_runs(
    data: bytes, prefix: Path, publisher: Publisher, server: Server
) -> None:
    blob = f"blobs/{blob_of(publisher, 'one')}"
    server.replies[blob] = data
    # Of a body that is too long, only the signed length is read.
    if data.startswith(b"one"):
        assert apply(prefix, source_of(publisher, server))
        return
    with pytest.raises(EdgetuneError, match=r"are damaged|2 of 3 bytes"):
        apply(prefix, source_of(publisher, server))
    assert ask(prefix) == "zero"
    server.replies.clear()
    assert apply(prefix)
    assert ask(prefix) == "one"


@pytest.mark.parametrize(
    ("path", "data", "problem"),
    [
        ("metadata/timestamp.json", b"<html>log in</html>", "is refused"),
        ("metadata/timestamp.json", b"x" * 5000, "more than 4000 bytes"),
        ("metadata/timestamp.json", b"[]", "is refused"),
        ("metadata/timestamp.json", b'{"signed": {"_type": "timestamp"}, "signatures": []}', "is refused"),
        ("metadata/1.snapshot.json", b"<html>", "is refused"),
        ("metadata/1.targets.json", b"<html>", "is refused"),
        ("metadata/1.bundle-home.json", b"{}", "is refused"),
        ("metadata/2.root.json", b"<html>", "is refused"),
    ],
)
def test_what_is_not_the_signed_metadata_is_refused_in_one_line(
    path: str, data: bytes, problem: str, prefix: Path, publisher: Publisher, server: Server
) -> None:
    server.replies[path] = data
    with pytest.raises(EdgetuneError, match=problem) as caught:
        apply(prefix, source_of(publisher, server))
    assert "\n" not in str(caught.value)
    assert ask(prefix) == "zero"


@pytest.mark.parametrize(
    "path", ["metadata/timestamp.json", "metadata/1.snapshot.json", "metadata/1.targets.json", "blobs", "targets"]
)
def test_a_repository_that_is_half_there_is_refused_in_one_line(
    path: str, prefix: Path, publisher: Publisher, server: Server
) -> None:
    (publisher.repo / path).rename(publisher.repo / "away")
    with pytest.raises(UnreachableError, match="status 404") as caught:
        apply(prefix, source_of(publisher, server))
    assert "\n" not in str(caught.value)
    assert ask(prefix) == "zero"
    (publisher.repo / "away").rename(publisher.repo / path)
    assert apply(prefix, source_of(publisher, server))


def test_a_server_that_is_not_there_or_redirects_is_given_up(
    prefix: Path, publisher: Publisher, server: Server
) -> None:
    with pytest.raises(UnreachableError, match="refused"):
        apply(prefix, UpdateSource(repo="http://127.0.0.1:1", root=publisher.root))
    server.redirects["metadata/timestamp.json"] = "file:///etc/passwd"
    with pytest.raises(UnreachableError):
        apply(prefix, source_of(publisher, server))
    server.redirects["metadata/timestamp.json"] = "/metadata/timestamp.json"
    with pytest.raises(UnreachableError):
        apply(prefix, source_of(publisher, server))
    server.redirects.clear()
    assert ask(prefix) == "zero"


def test_an_old_state_of_the_repository_is_refused(prefix: Path, publisher: Publisher, tmp_path: Path) -> None:
    publisher("one")
    old = Path(shutil.copytree(publisher.repo, tmp_path / "old"))
    publisher("two")
    apply(prefix, source_of(publisher, publisher.repo))
    with pytest.raises(VerificationError, match="is refused"):
        apply(prefix, UpdateSource(repo=str(old)))
    # Also after a rollback, and by somebody who can delete the metadata.
    current.roll_back(prefix, "this device went back from it", silent)
    shutil.rmtree(prefix / "update/metadata")
    with pytest.raises(VerificationError, match="release 1 of home is older than 2"):
        apply(prefix, UpdateSource(repo=str(old)))
    assert ask(prefix) == "zero"


def test_states_of_a_repository_are_not_mixed(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    apply(prefix, source_of(publisher, publisher.repo))
    publisher("two")
    metadata = publisher.repo / "metadata"
    shutil.copy(metadata / "1.snapshot.json", metadata / "2.snapshot.json")
    with pytest.raises(VerificationError, match="is refused"):
        apply(prefix)
    assert ask(prefix) == "one"


def test_a_bundle_signed_by_the_keys_of_another_role_is_refused(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    metadata = publisher.repo / "metadata/1.bundle-home.json"
    raw = json.loads(metadata.read_text())
    timestamp = json.loads((publisher.repo / "metadata/timestamp.json").read_text())
    raw["signatures"] = timestamp["signatures"]
    metadata.write_text(json.dumps(raw))
    with pytest.raises(VerificationError, match="is refused"):
        apply(prefix, source_of(publisher, publisher.repo))


def test_a_clock_that_was_reset_does_not_accept_what_has_expired(
    prefix: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher("one")

    class Reset(trust.datetime):
        @classmethod
        def now(cls, tz: object = None) -> trust.datetime:
            return cls(1970, 1, 1, tzinfo=trust.UTC)

    monkeypatch.setattr(trust, "datetime", Reset)
    # A device that was never online has the time of its root, and one that was, that of the newest metadata.
    assert apply(prefix, source_of(publisher, publisher.repo))
    assert read_state(prefix).time.year > 2025
    state = read_state(prefix)
    later = state.time.replace(year=state.time.year + 1)
    write_state(prefix, replace(state, not_before=later.isoformat()))
    with pytest.raises(VerificationError, match=r"is expired, as it is .* UTC here"):
        update.check(prefix, NOTHING)
    assert ask(prefix) == "one"


def test_a_release_for_a_newer_runtime_is_refused_before_it_is_downloaded(prefix: Path, publisher: Publisher) -> None:
    publisher("two", min_runtime="99.1")
    with (
        serving(publisher.repo) as server,
        pytest.raises(IncompatibleError, match=r"release 1 of home needs edgetune-runtime 99.1, this is"),
    ):
        apply(prefix, source_of(publisher, server))
    assert not any(path.startswith("blobs/") for path in server.requests)
    assert ask(prefix) == "zero"


def test_a_disk_or_a_quota_without_room_is_noticed_before_anything_is_downloaded(
    prefix: Path, publisher: Publisher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_100))
    with pytest.raises(OutOfSpaceError, match="50 MB are free"):
        apply(prefix, source_of(publisher, server))
    assert not any(path.startswith("blobs/") for path in server.requests)
    monkeypatch.undo()
    used = sum(path.stat().st_size for path in (prefix / "files").iterdir()) / 1e6
    with pytest.raises(OutOfSpaceError, match=r"the versions here would have .* MB are allowed; allow more with"):
        apply(prefix, replace(source_of(publisher, server), quota_mb=used))
    # It is remembered.
    with pytest.raises(OutOfSpaceError):
        apply(prefix)
    assert not any(path.startswith("blobs/") for path in server.requests)
    assert ask(prefix) == "zero"
    assert apply(prefix, UpdateSource(quota_mb=used + 0.1))


def test_what_a_failed_release_has_left_makes_room_for_the_next(
    prefix: Path, publisher: Publisher, server: Server
) -> None:
    assert apply(prefix, source_of(publisher, server))
    publisher("wrong")
    with pytest.raises(VerificationError):
        apply(prefix)
    publisher("three")
    used = sum(path.stat().st_size for path in (prefix / "files").iterdir()) / 1e6
    assert apply(prefix, UpdateSource(quota_mb=used + 0.0005))
    assert ask(prefix) == "three"


def test_a_fresh_device_without_room_is_told_so(publisher: Publisher, server: Server, tmp_path: Path) -> None:
    with pytest.raises(OutOfSpaceError, match=r"MB are allowed; allow more with --quota-mb"):
        apply(tmp_path / "new", replace(source_of(publisher, server), quota_mb=1e-6))


def test_what_a_sweep_that_was_cut_off_has_left_does_not_keep_later_ones_from_deleting(
    prefix: Path, publisher: Publisher, server: Server
) -> None:
    # In whatever order a file system lists them.
    for name in (f"{start}{number:016}" for number in range(8) for start in ("", ".")):
        (prefix / "versions" / name / "bundle").mkdir(parents=True)
    assert apply(prefix, source_of(publisher, server))
    assert len(list((prefix / "versions").iterdir())) == 2


def test_two_updates_at_once_are_refused(prefix: Path, publisher: Publisher, server: Server) -> None:
    with installing(prefix), pytest.raises(BusyError):
        apply(prefix, source_of(publisher, server))
    # A command that changes the prefix for a moment is waited for.
    other = ExitStack()
    other.enter_context(locked(prefix))
    threading.Timer(0.3, other.close).start()
    assert apply(prefix, source_of(publisher, server))


def test_a_device_that_goes_back_while_metadata_is_read_stays_there(
    prefix: Path, publisher: Publisher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert apply(prefix, source_of(publisher, server))
    choose = update.choose

    def choose_while(*arguments: Any) -> Any:  # noqa: ANN401 - those of choose
        current.roll_back(prefix, "it was marked as bad", silent)
        return choose(*arguments)

    monkeypatch.setattr(update, "choose", choose_while)
    assert not apply(prefix)
    monkeypatch.undo()
    assert not apply(prefix)
    assert ask(prefix) == "zero"
    assert [*read_state(prefix).refused.values()] == ["it was marked as bad"]


def test_a_device_goes_back_and_counts_starts_while_it_downloads(
    prefix: Path, publisher: Publisher, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(publisher, server)
    assert apply(prefix, source)
    publisher("two")

    def download_while(*arguments: Any) -> None:  # noqa: ANN401 - those of download
        assert current.count_start(prefix, silent) == kit.version
        pending = acknowledgement.read(prefix)
        assert pending is not None and pending.starts == 1
        assert current.roll_back(prefix, "it was marked as bad", silent) != kit.version
        assert ask(prefix) == "zero"
        download(*arguments)

    monkeypatch.setattr(update, "download", download_while)
    kit = current.current_kit(prefix)
    assert kit is not None
    assert apply(prefix, source)
    assert ask(prefix) == "two"
    state = read_state(prefix)
    assert (state.refused, state.floors["home"]) == ({kit.bundle: "it was marked as bad"}, 2)


def test_what_a_device_does_not_know_is_asked_for_in_one_line(
    prefix: Path, publisher: Publisher, tmp_path: Path
) -> None:
    publisher("one")
    publish(write_bundle(tmp_path / "other", "three"), publisher.repo, publisher.keys)
    repo = str(publisher.repo)
    with pytest.raises(UsageError, match="add --repo URL"):
        apply(prefix)
    with pytest.raises(UsageError, match="add --root FILE once"):
        apply(prefix, UpdateSource(repo=repo))
    with pytest.raises(NotFoundError, match="cannot read --root"):
        apply(prefix, UpdateSource(repo=repo, root=tmp_path / "none"))
    with pytest.raises(UsageError, match="has no root of a repository"):
        apply(prefix, UpdateSource(repo=repo, root=publisher.bundle / "answer.txt"))
    with pytest.raises(UsageError, match="--repo 'ftp://x' is not an address"):
        apply(prefix, UpdateSource(repo="ftp://x", root=publisher.root))
    with pytest.raises(UsageError, match="the repository has 2 bundles; add --bundle NAME: home, other"):
        apply(tmp_path / "new", UpdateSource(repo=repo, root=publisher.root))
    with pytest.raises(NotFoundError, match="no bundle 'third'"):
        apply(prefix, UpdateSource(repo=repo, root=publisher.root, bundle="third"))
    (prefix / "update").mkdir(exist_ok=True)
    (prefix / "update/state.json").write_text(text_of_state({"floors": 3}))
    with pytest.raises(VerificationError, match="floors cannot be '3'"):
        apply(prefix)
    assert ask(prefix) == "zero"


def test_an_update_that_is_killed_at_any_write_leaves_a_version_running(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    apply(prefix, source_of(publisher, publisher.repo))
    publisher("two")
    seen = []
    for _ in left_by_kills(lambda: int(not apply(prefix)), prefix):
        seen.append(ask(prefix))
        apply(prefix)
        assert answer_of(prefix) == "two"
        assert read_state(prefix).floors == {"home": 2}
        assert len(list((prefix / "versions").iterdir())) == 2
    assert len(seen) > 30
    assert seen == sorted(seen) and set(seen) == {"one", "two"}


def test_a_switch_that_was_cut_off_is_completed_once(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    apply(prefix, source_of(publisher, publisher.repo))
    with locked(prefix):
        write_state(prefix, replace(read_state(prefix), switching=(prefix / "current").readlink().name))
    apply(prefix)
    assert read_state(prefix).switching == ""


@pytest.mark.parametrize(("failing", "expected"), [(full_from, OutOfSpaceError), (read_only_from, UsageError)])
def test_a_disk_that_cannot_be_written_from_any_write_on_leaves_the_old_version_running(
    failing: Callable[..., int], expected: type[EdgetuneError], prefix: Path, publisher: Publisher, tmp_path: Path
) -> None:
    publisher("one")
    apply(prefix, source_of(publisher, publisher.repo))
    publisher("two")
    kept, seen = tmp_path / "kept", []
    prefix.rename(kept)
    for write in range(1, 500, 8):
        copied(kept, prefix)
        code = failing(write, lambda: main(["update", "--apply", "--prefix", str(prefix)]))
        seen.append(ask(prefix))
        apply(prefix)
        assert answer_of(prefix) == "two"
        if code == 0:
            break
        assert code == expected.exit_code
    assert write > 30
    assert seen == sorted(seen) and set(seen) == {"one", "two"}


def test_a_device_follows_a_new_repository_with_other_keys_once_it_has_forgotten_the_old_one(
    prefix: Path, publisher: Publisher, tmp_path: Path
) -> None:
    for answer in ("one", "two"):
        publisher(answer)
    apply(prefix, source_of(publisher, publisher.repo))
    other = Publisher(tmp_path / "other")
    other("three")
    with pytest.raises(VerificationError, match="release 1 of home is older than 2"):
        apply(prefix, source_of(other, other.repo))
    shutil.rmtree(prefix / "update")
    assert apply(prefix, source_of(other, other.repo))
    assert ask(prefix) == "three"


def test_a_rollback_that_is_killed_at_any_write_can_be_run_again(prefix: Path, publisher: Publisher) -> None:
    for answer in ("one", "two"):
        publisher(answer)
        apply(prefix, source_of(publisher, publisher.repo))
    seen = []

    def go_back() -> int:
        current.roll_back(prefix, "this device went back from it", silent)
        return 0

    for _ in left_by_kills(go_back, prefix):
        seen.append(ask(prefix))
        if seen[-1] == "two" or (prefix / ".rollback").is_symlink():
            go_back()
        assert answer_of(prefix) == "one"
        assert not apply(prefix)
    assert len(seen) > 10 and set(seen) == {"one", "two"}


def test_the_command_speaks_json(
    prefix: Path, publisher: Publisher, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["update", "--prefix", str(prefix), "--json"]
    assert main([*words, "--apply", "--repo", server.url, "--root", str(publisher.root)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["release"], shown["changed"], shown["path"]) == (1, True, str(prefix / "current/bundle"))
    assert main([*words, "--rollback"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == (prefix / "current").readlink().name
    assert main([*words, "--status"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"]
    assert main(["update", "--prefix", str(prefix / "none"), "--status"]) == 3
    with pytest.raises(SystemExit, match="2"):
        main(["update", "--prefix", str(prefix)])


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch, stream: str) -> Iterator[None]:
    """With a standard stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = os.fdopen(writer, "w", buffering=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, stream, closed)
        yield
    with suppress(BrokenPipeError):
        closed.close()


def test_an_update_goes_on_when_nobody_reads_what_it_says(
    prefix: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher("one")
    words = ("--repo", publisher.repo, "--root", publisher.root)
    with unread(monkeypatch, "stderr"):
        assert main(["update", "--apply", "--prefix", str(prefix), *map(str, words)]) == 0
    assert ask(prefix) == "one"


def test_a_first_update_without_a_network_ends_in_one_line(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    words = ["--repo", "http://127.0.0.1:1/repo", "--root", str(publisher.root)]
    assert main(["update", "--check", "--prefix", str(prefix), *words]) == UnreachableError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert "127.0.0.1:1" in line and "refused" in line


def test_what_root_installs_can_be_read_by_the_account_of_a_unit(prefix: Path, publisher: Publisher) -> None:
    if os.geteuid() != 0:
        pytest.skip("only what root installs is for other accounts")
    publisher("one")
    words = ("--repo", publisher.repo, "--root", publisher.root)
    before = os.umask(0o077)
    try:
        assert main(["update", "--apply", "--prefix", str(prefix), *map(str, words)]) == 0
    finally:
        os.umask(before)
    installed = [prefix / "current", *(prefix / "current/").rglob("*")]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in installed if path.is_file())
    assert all(path.stat().st_mode & 0o055 == 0o055 for path in installed if path.is_dir())


def test_output_that_nobody_reads_is_no_error_of_the_disk(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with unread(monkeypatch, "stdout"):
        assert main(["update", "--status", "--prefix", str(prefix)]) == 0
    assert capsys.readouterr().err == ""


def test_windows_is_told_that_it_has_no_updates(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["update", "--status", "--prefix", str(prefix)]) == IncompatibleError.exit_code
    assert "updates need links and locks that Windows does not have" in capsys.readouterr().err
