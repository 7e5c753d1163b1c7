from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from edgetune.common import progress
from edgetune.common.progress import Progress, ProgressEvent


class Clock:
    """Seconds that only a test moves on."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def test_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("loading the base")
    assert capsys.readouterr() == ("", "loading the base\n")


@pytest.mark.parametrize("text", ["rows [1, 2] of [red]warm[/red]", "a.jsonl:100: [/] :warning:", "x" * 300])
def test_text_appears_as_it_is(text: str, capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    shown = Progress()
    shown.say(text)
    with shown.step(text, 2) as step:
        clock.now += 10
        step.update(text)
    assert capsys.readouterr().err == f"{text}\n{text}: 1/2 {text}, 10 s left\n"


def test_a_running_step_prints_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress().step("training reply", 100) as step:
        for _ in range(50):
            clock.now += 1
            step.update("loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"training reply: {n}/100 loss 0.5, {100 - n} s left" for n in (10, 20, 30, 40, 50)]


def test_the_time_left_leaves_out_what_an_earlier_run_did(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress().step("training reply", 100) as step:
        step.update("resumed", 60)
        for done in range(61, 81):
            clock.now += 2
            step.update("loss 0.5", done)
    assert capsys.readouterr().err.splitlines()[-1] == "training reply: 80/100 loss 0.5, 40 s left"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    shown = Progress(quiet=True)
    shown.say("loading the base")
    with shown.step("training reply", 3) as step:
        clock.now += 60
        step.update("loss 0.5")
        assert step.done == 1
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_lines_also_where_a_notebook_asks_for_color(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress().step("training reply", 4) as step:
        clock.now += 10
        step.update("loss 0.5")
    assert capsys.readouterr().err == "training reply: 1/4 loss 0.5, 30 s left\n"


def test_a_terminal_gets_a_bar_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with Progress().step("training [reply]", 4) as step:
        step.update("loss [0.5]", 3)
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("training [reply]", "3/4", "loss [0.5]"):
        assert part in err


def test_a_callback_gets_events_in_place_of_output(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[ProgressEvent] = []
    shown = Progress(events.append)
    shown.say("loading\x1b the base")
    with shown.step("training reply", 4) as step:
        step.train_loss = 0.5
        step.update("loss 0.5")
        step.update("resumed", 3)
    assert events == [
        ProgressEvent("loading  the base"),
        ProgressEvent("loss 0.5", "training reply", 1, 4, train_loss=0.5),
        ProgressEvent("resumed", "training reply", 3, 4, train_loss=0.5),
    ]
    assert capsys.readouterr() == ("", "")
