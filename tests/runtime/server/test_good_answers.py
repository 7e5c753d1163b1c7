from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgetune_runtime.store import acknowledgement
from runtime.server.conftest import Running, started
from runtime.server.test_health import CHAT
from runtime.stores import switch_to


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(acknowledgement.REPORT_VARIABLE, str(tmp_path / "run.json"))
    return tmp_path / "run.json"


@pytest.fixture
def current(bundle: Path, tmp_path: Path) -> Path:
    """The bundle of a version that is not acknowledged."""
    path = switch_to(tmp_path / "home", "a" * 16, bundle)
    acknowledgement.begin(tmp_path / "home", "a" * 16, golden_prompts=0)
    return path


def ask(server: Running, **changes: object) -> int:
    return server.client.post("/v1/chat/completions", json=CHAT | changes).status_code


def test_a_server_reports_good_answers_until_its_version_is_acknowledged(
    current: Path, report: Path, tmp_path: Path
) -> None:
    with started(current) as server:
        assert not report.exists()
        assert [ask(server), ask(server, model="none"), ask(server)] == [200, 404, 200]
        assert json.loads(report.read_text()) == {"version": "a" * 16, "answers": 2, "has_ended": False}
        assert [ask(server) for _ in range(3)] == [200] * 3
        assert json.loads(report.read_text())["answers"] == acknowledgement.GOOD_ANSWERS
    assert json.loads(report.read_text())["has_ended"]
    acknowledgement.count_start(tmp_path / "home")
    with started(current) as server:
        assert ask(server) == 200
    assert not report.exists()


def test_a_report_that_cannot_be_written_keeps_nobody_from_an_answer(
    current: Path, report: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report.mkdir()
    with started(current) as server:
        assert ask(server) == 200
    # llama.cpp warns of a token of the tiny base.
    assert {record.name for record in caplog.records} <= {"edgetune_runtime.llama_cpp"}
