from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from edgetune_runtime.cli import main
from edgetune_runtime.errors import BusyError, UsageError, VerificationError
from edgetune_runtime.store.durable import installing
from edgetune_runtime.update import slow_replies
from edgetune_runtime.update.report import LONGEST_REPORT, DeviceReport, checked_address, parse_report
from edgetune_runtime.update.state import read_state, write_state
from ports import replying
from repositories import Publisher

from edgetune.cli.main import main as host
from edgetune.delivery.publish.reports import fleet_status

pytestmark = pytest.mark.slow
REPORT = DeviceReport(
    device="ab" * 16, name="home", channel="stable", release=3, bundle="cd" * 32, runtime="0.1.0",
    time=datetime.now(UTC).isoformat(), acknowledged=True,
)  # fmt: skip


def update(prefix: Path, *words: object) -> int:
    return main(["update", "--apply", "--prefix", str(prefix), *map(str, words)])


def test_a_device_reports_to_a_folder_only_if_its_user_says_so(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    folder = publisher.repo / "reports"
    folder.mkdir()
    source = ("--repo", publisher.repo, "--root", publisher.root)
    assert update(prefix, *source) == 0
    assert not list(folder.iterdir())
    assert update(prefix, "--report", folder) == 0
    (path,) = folder.iterdir()
    found = parse_report(path.read_bytes())
    assert (path.stem, found.name, found.release, found.acknowledged) == (found.device, "home", 1, False)
    publisher("one", min_runtime="0.0.1")
    assert update(prefix) == 0
    assert parse_report(path.read_bytes()).release == 2
    with installing(prefix):
        assert update(prefix) == BusyError.exit_code
    assert parse_report(path.read_bytes()).error == ""
    publisher("wrong")
    for _ in range(3):
        update(prefix)
    failed = parse_report(path.read_bytes())
    assert (failed.release, failed.refused, failed.error) == (1, 0, "")
    publisher("wrong again", min_runtime="99.0")
    assert update(prefix) == 0
    assert "needs edgetune-runtime 99.0" in parse_report(path.read_bytes()).held_back
    (publisher.repo / "metadata/timestamp.json").write_text("<html>")
    assert update(prefix) == VerificationError.exit_code
    assert "is refused" in parse_report(path.read_bytes()).error
    capsys.readouterr()
    assert host(["fleet", "status", str(publisher.repo)]) == 0
    out = capsys.readouterr().out
    assert f"{found.device} has release 1: " in out
    assert path.stat().st_size < LONGEST_REPORT
    # Another device may put anything there.
    os.truncate(path, 1 << 43)
    assert update(prefix) == VerificationError.exit_code
    assert path.stat().st_size < LONGEST_REPORT
    folder.rename(publisher.repo / "away")
    update(prefix)
    assert f"the report was not sent: there is no folder {folder}; mount it" in capsys.readouterr().err
    assert not folder.exists()


def test_an_update_that_a_disk_or_a_damaged_file_ends_is_reported(prefix: Path, publisher: Publisher) -> None:
    publisher("one")
    folder = publisher.repo / "reports"
    folder.mkdir()
    assert update(prefix, "--repo", publisher.repo, "--root", publisher.root, "--report", folder) == 0
    (path,) = folder.iterdir()
    publisher("two")
    (prefix / "files").rename(prefix / "aside")
    (prefix / "files").touch()
    assert update(prefix) == UsageError.exit_code
    assert "Not a directory; check the disk" in parse_report(path.read_bytes()).error
    (prefix / "files").unlink()
    (prefix / "aside").rename(prefix / "files")
    kit = prefix / "current/kit.json"
    kit.chmod(0o644)
    for damaged in (b"", b"\xff"):
        kit.write_bytes(damaged)
        assert update(prefix) == VerificationError.exit_code
        told = parse_report(path.read_bytes()).error
        assert f"{kit.resolve()} is damaged" in told and "go back with `edgetune-run update --rollback`" in told


def test_a_report_is_posted_and_a_server_that_refuses_it_changes_nothing(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    source = ("--repo", publisher.repo, "--root", publisher.root)
    with replying((200, b"")) as (url, got):
        assert update(prefix, *source, "--report", url) == 0
        assert update(prefix) == 0
    assert [parse_report(sent.body).release for sent in got] == [1, 1]
    for status in (500, 307, 302):
        with replying((status, b"")) as (url, got):
            assert update(prefix, "--report", url) == 0
            assert len(got) == 1
        assert f"the report was not sent: status {status}" in capsys.readouterr().err
    assert update(prefix) == 0
    assert "the report was not sent" in capsys.readouterr().err
    assert update(prefix, "--report", "off") == 0
    assert update(prefix) == 0
    assert (capsys.readouterr().err, read_state(prefix).report_to) == ("", "off")


@pytest.mark.parametrize(
    "where",
    [
        *("ftp://x", "/nowhere/at/all", "file:///etc", "http://[x", "http://.x", "https://x/ä", "https://x/a b"),
        *("http://", "http://x:port", f"http://{'x' * 64}.org"),
    ],
)
def test_an_address_that_is_none_is_one_line(where: str, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert update(prefix, "--report", where) == UsageError.exit_code
    assert f"--report {where!r} is neither an address nor a folder" in capsys.readouterr().err


def test_an_address_with_a_login_is_refused_without_showing_it(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert update(prefix, "--report", "https://user:secret@example.org/reports") == UsageError.exit_code
    error = capsys.readouterr().err
    assert "--report has a login in its address" in error and "secret" not in error


@pytest.mark.parametrize("where", ["https://x", "http://[::1]:80/a?b=%20", "http://example.org:8000/reports/"])
def test_an_address_is_taken_as_it_is(where: str) -> None:
    assert checked_address(where) == where


def test_an_update_goes_on_if_the_remembered_address_is_damaged(
    prefix: Path, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    assert update(prefix, "--repo", publisher.repo, "--root", publisher.root) == 0
    for where in ("http://[x", "https://x/ä", "http://.x"):
        write_state(prefix, replace(read_state(prefix), report_to=where))
        assert update(prefix) == 0
        assert "the report was not sent" in capsys.readouterr().err


def test_a_server_that_answers_a_report_too_slowly_is_left(
    prefix: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher("one")
    with replying((200, b"")) as (url, _):
        assert update(prefix, "--repo", publisher.repo, "--root", publisher.root, "--report", url) == 0
        # Too slow is now everybody who is asked over HTTP.
        monkeypatch.setattr(slow_replies, "_GRACE_S", -1.0)
        monkeypatch.setattr(slow_replies, "_SLOWEST_BYTES_PER_S", 10**9)
        assert update(prefix) == 0
    assert "the report was not sent: it came too slowly" in capsys.readouterr().err


def test_the_devices_of_a_fleet_are_counted_by_release(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    old = (datetime.now(UTC) - timedelta(days=8)).isoformat()
    for number, report in enumerate(
        [
            REPORT,
            REPORT,
            replace(REPORT, release=2, error="no room", time=old),
            replace(REPORT, release=2, held_back="x"),
        ]
    ):
        one = replace(report, device=f"{number:032x}")
        (folder / f"{one.device}.json").write_text(json.dumps(asdict(one)))
    # What others may have put there.
    (folder / f"{9:032x}.json").write_text(json.dumps(asdict(REPORT)))
    (folder / f"{8:032x}.json").write_text("x" * (LONGEST_REPORT + 1))
    (folder / f"{7:032x}.json").symlink_to("/etc/passwd")
    os.mkfifo(folder / f"{6:032x}.json")
    found = fleet_status(tmp_path, 7)
    rows = [(each.release, each.devices, each.held_back, each.failing, each.silent) for each in found.releases]
    assert rows == [(3, 2, 0, 0, 0), (2, 2, 1, 1, 1)]
    assert ([each.error for each in found.failing], found.damaged) == (["no room"], 4)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "../x"},
        {"name": "\ud800"},
        {"channel": ""},
        {"time": "2026-01-01"},
        {"time": "x"},
        {"release": "3"},
        {"release": -1},
        {"error": 3},
        {"error": "\x1b[31m"},
    ],
)
def test_a_damaged_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(VerificationError, match="the report is damaged"):
        parse_report(json.dumps(asdict(REPORT) | change).encode())


def test_a_repository_without_reports_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert host(["fleet", "status", str(tmp_path)]) == 3
    assert "has no folder reports; make it, and have devices report there" in capsys.readouterr().err
