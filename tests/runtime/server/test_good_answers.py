from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest
from edgetune_runtime.store import acknowledgement
from runtime.server.test_serve_command import CHAT, serving
from runtime.stores import switch_to


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(acknowledgement.REPORT_VARIABLE, str(tmp_path / "run.json"))
    return tmp_path / "run.json"


def ask(url: str, **changes: object) -> int:
    return httpx.post(f"{url}/v1/chat/completions", json=CHAT | changes, timeout=30).status_code


def test_a_server_reports_good_answers_until_its_version_is_acknowledged(
    bundle: Path, report: Path, tmp_path: Path
) -> None:
    current = switch_to(tmp_path / "home", "a" * 16, bundle)
    acknowledgement.begin(tmp_path / "home", "a" * 16, golden_prompts=0)
    with serving(current, "--contexts", 1) as (process, url):
        assert not report.exists()
        assert [ask(url), ask(url, model="none"), ask(url)] == [200, 404, 200]
        assert json.loads(report.read_text()) == {"version": "a" * 16, "answers": 2, "has_ended": False}
        assert [ask(url) for _ in range(3)] == [200] * 3
        assert json.loads(report.read_text())["answers"] == acknowledgement.GOOD_ANSWERS
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert json.loads(report.read_text())["has_ended"]
    acknowledgement.count_start(tmp_path / "home")
    with serving(current, "--contexts", 1) as (_, url):
        assert ask(url) == 200
    assert not report.exists()


def test_a_report_that_cannot_be_written_keeps_nobody_from_an_answer(
    bundle: Path, report: Path, tmp_path: Path
) -> None:
    report.mkdir()
    current = switch_to(tmp_path / "home", "a" * 16, bundle)
    acknowledgement.begin(tmp_path / "home", "a" * 16, golden_prompts=0)
    with serving(current, "--contexts", 1) as (process, url):
        assert ask(url) == 200
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == ""
