from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from edgetune_runtime.cli import main
from edgetune_runtime.errors import NotFoundError
from edgetune_runtime.store import acknowledgement
from edgetune_runtime.store.acknowledgement import REPORT_VARIABLE, RunReport, write_report
from edgetune_runtime.store.durable import locked
from edgetune_runtime.update import current
from edgetune_runtime.update.state import read_state
from kills import left_by_kills
from kits import KitMaker, ask
from repositories import Publisher, apply, silent

from edgetune.delivery.board import main as board

pytestmark = pytest.mark.slow


def start(prefix: Path) -> str:
    """What the version answers that runs after a start."""
    current.count_start(prefix, silent)
    return ask(prefix)


@pytest.fixture
def switched(prefix: Path, publisher: Publisher) -> Path:
    """A prefix that an update has switched to a bundle that answers "one"."""
    publisher("one")
    assert apply(prefix, publisher)[1]
    return prefix


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a run is reported."""
    monkeypatch.setenv(REPORT_VARIABLE, str(tmp_path / "run.json"))
    return tmp_path / "run.json"


def test_the_third_start_without_an_acknowledgement_goes_back_and_leaves_the_bundle_out(
    switched: Path, publisher: Publisher
) -> None:
    assert [start(switched) for _ in range(4)] == ["one", "one", "zero", "zero"]
    (reason,) = read_state(switched).refused.values()
    assert reason == "it was started 2 times without a clean exit, and not acknowledged"
    assert not apply(switched, publisher)[1]
    assert ask(switched) == "zero"
    publisher("two")
    assert apply(switched, publisher)[1]
    assert ask(switched) == "two"


@pytest.mark.parametrize("damaged", ["update/state.json", "current/kit.json"])
@pytest.mark.parametrize("option", ["--starting", "--rollback"])
def test_what_is_damaged_keeps_no_device_from_going_back(
    option: str, damaged: str, switched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        start(switched)
    (switched / damaged).write_text("{")
    assert main(["update", option, "--prefix", str(switched)]) == 0
    assert "the bundle that runs now is not skipped in later updates: " in capsys.readouterr().err
    assert ask(switched) == "zero"


def test_a_kit_is_gone_back_from_too(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "kits").mkdir()
    assert board.main(["install", str(KitMaker(tmp_path / "kits")("kit")), "--prefix", str(prefix)]) == 0
    assert [start(prefix) for _ in range(3)] == ["kit", "kit", "zero"]


def test_the_first_version_and_one_that_was_gone_back_to_are_kept(switched: Path) -> None:
    current.roll_back(switched, "this device went back from it", silent)
    assert [start(switched) for _ in range(4)] == ["zero"] * 4
    current.roll_back(switched, "this device went back from it", silent)
    assert [start(switched) for _ in range(4)] == ["one"] * 4


def test_a_version_that_was_marked_as_good_is_kept(switched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not current.status(switched, silent)["acknowledged"]
    assert main(["update", "--starting", "--prefix", str(switched)]) == 0
    assert main(["update", "--mark-good", "--json", "--prefix", str(switched)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["version"] == (switched / "current").readlink().name
    assert current.status(switched, silent)["acknowledged"]
    assert [start(switched) for _ in range(4)] == ["one"] * 4
    assert main(["update", "--mark-good", "--prefix", str(switched / "none")]) == NotFoundError.exit_code
    assert main(["update", "--starting", "--prefix", str(switched / "none")]) == NotFoundError.exit_code
    assert not (switched / "none").exists()


def test_what_is_counted_of_a_version_holds_if_a_switch_from_it_is_cut_off(switched: Path) -> None:
    assert start(switched) == "one"
    acknowledgement.begin(switched, "0" * 16, golden_prompts=2)
    assert not current.status(switched, silent)["acknowledged"]
    assert [start(switched) for _ in range(3)] == ["one", "zero", "zero"]


def test_good_answers_of_several_runs_acknowledge_a_version(switched: Path, report: Path) -> None:
    version = (switched / "current").readlink().name
    for answers in (1, 2):
        assert start(switched) == "one"
        write_report(RunReport(version, answers))
    assert [start(switched) for _ in range(4)] == ["one"] * 4
    assert acknowledgement.read(switched) is None
    assert not report.exists()


def test_a_start_whose_run_ended_in_order_does_not_count(switched: Path, report: Path) -> None:
    version = (switched / "current").readlink().name
    for _ in range(4):
        assert start(switched) == "one"
        write_report(RunReport(version, has_ended=True))
    assert [start(switched) for _ in range(3)] == ["one", "one", "zero"]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "another", "answers": 9}', '{"version": 3}'])
def test_a_report_that_is_damaged_or_of_another_version_does_not_count(text: str, switched: Path, report: Path) -> None:
    report.write_text(text)
    assert [start(switched) for _ in range(3)] == ["one", "one", "zero"]


def test_a_report_that_is_no_file_is_not_read(switched: Path, report: Path, tmp_path: Path) -> None:
    version = (switched / "current").readlink().name
    (tmp_path / "other.json").write_text(json.dumps({"version": version, "answers": 9}))
    report.symlink_to("other.json")
    assert start(switched) == "one"
    report.unlink()
    os.mkfifo(report)
    assert [start(switched) for _ in range(2)] == ["one", "zero"]


def test_starts_by_an_install_do_not_count(switched: Path) -> None:
    with locked(switched):
        assert [start(switched) for _ in range(4)] == ["one"] * 4
    assert start(switched) == "one"


def test_going_back_at_a_start_that_is_killed_at_any_write_is_completed_by_the_next_start(
    switched: Path, publisher: Publisher, tmp_path: Path
) -> None:
    for _ in range(2):
        start(switched)
    seen = []
    for _ in left_by_kills(lambda: int(current.count_start(switched, silent) == ""), switched):
        seen.append(start(switched))
        assert not apply(switched, publisher)[1]
        assert not (switched / ".rollback").is_symlink()
    assert len(seen) > 10 and set(seen) == {"zero"}
