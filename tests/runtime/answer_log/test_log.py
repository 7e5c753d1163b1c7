from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Manifest, NotFoundError, OutOfSpaceError, ToolCall, UsageError, VerificationError
from edgetune_runtime.answer_log import redaction
from edgetune_runtime.answer_log.log import AnswerLog, append_lines
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.answer_log.redaction import REDACTED, Redaction
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.text.chat import messages_for
from edgetune_runtime.tools.definitions import tool_set
from runtime.conftest import without_free_files


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def test_answers_and_their_corrections_are_read_back(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest)
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "lights on"}]
    first = log.answered("lights off", "light.off", adapter="command", confidence=0.25)
    second = log.answered(chat, "light.on", adapter="tone")
    third = log.answered("play", "media.play")
    log.corrected(first, "light.turn_off")
    log.corrected(first, "light.all_off")
    log.corrected(second)
    found = {entry.id: entry for entry in read_answer_log(path, manifest)}
    assert list(found) == [third, first, second]
    assert (found[first].correction, found[first].confidence, found[first].adapter) == (
        "light.all_off",
        0.25,
        "command",
    )
    assert found[first].messages == ({"role": "user", "content": "lights off"},)
    assert (found[second].correction, list(found[second].messages)) == ("light.on", chat)
    assert (found[third].correction, found[third].adapter) == (None, None)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_an_expression_finds_is_replaced_everywhere(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest, redact=[r"\d{4,}", "(?i)anna"])
    log.corrected(log.answered("call Anna at 5551234", "dial 5551234", adapter="command"), "dial anna 12")
    (entry,) = read_answer_log(path, manifest)
    texts = [entry.messages[0]["content"], entry.answer, entry.correction]
    assert texts == [f"call {REDACTED} at {REDACTED}", f"dial {REDACTED}", f"dial {REDACTED} 12"]
    assert "5551234" not in path.read_text() and "Anna" not in path.read_text()


def test_calls_of_tools_are_read_back(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    talk = [
        {"role": "user", "content": "lamp"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "lamp", "arguments": '{"level": 3}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
    ]
    # Ids are random, and the prompts of rows are compared.
    calls = [{"id": "call00001", "function": {"name": "lamp", "arguments": '{"level": 3}'}}]
    result = {**talk[2], "tool_call_id": "call00001"}
    call = ToolCall("lamp", {"level": 4})
    tools = [{"name": "lamp", "parameters": {"properties": {"level": {"type": "integer"}}}}]
    answer = log.answered(talk, "Sure.", calls=[call], tools=tools, adapter="command")
    log.corrected(answer)
    log.answered("play", "", tools=[], adapter="command")
    entry, plain = read_answer_log(log.path, manifest)
    assert entry.answer == entry.correction
    assert json.loads(entry.answer) == {
        "content": "Sure.",
        "tool_calls": [{"name": "lamp", "arguments": {"level": 4}}],
    }
    assert entry.messages == tuple(messages_for([talk[0], {**talk[1], "tool_calls": calls}, result], None))
    assert tool_set(entry.tools) == tool_set(tools)
    assert plain.tools is None


def test_what_an_expression_finds_in_calls_is_replaced(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest, redact=[r"\d{4,}", "(?i)anna"])
    before = {"name": "dial", "arguments": {"name": "Anna", "numbers": [5551234, 12, True, None]}}
    talk = [
        {"role": "user", "name": "anna-55512345", "content": "call"},
        {"role": "assistant", "tool_calls": [{"id": "123456789", "function": before}]},
    ]
    call = ToolCall("dial", {"name": "Anna"})
    answer = log.answered(talk, "", calls=[call], tools=[{"name": "dial"}], adapter="command")
    log.corrected(answer, '{"tool_calls": [{"name": "dial", "arguments": {"pin": 654321, "line": "b\\n123456"}}]}')
    (entry,) = read_answer_log(log.path, manifest)
    (earlier,) = entry.messages[1]["tool_calls"]
    assert earlier["function"]["arguments"] == {"name": REDACTED, "numbers": [REDACTED, 12, True, None]}
    assert json.loads(entry.answer)["tool_calls"] == [{"name": "dial", "arguments": {"name": REDACTED}}]
    (right,) = json.loads(entry.correction or "")["tool_calls"]
    assert right["arguments"] == {"pin": REDACTED, "line": f"b\n{REDACTED}"}
    assert not any(text in log.path.read_text() for text in ("Anna", "anna", "5551234", "123456789", "654321"))


@pytest.mark.parametrize(
    "correction",
    [
        '{"name": "lamp", "arguments": {}}',
        '[{"name": "lamp"}]',
        '{"tool_call": [{"name": "lamp"}]}',
        '```json\n{"tool_calls": []}',
        '{"tool_calls": "lamp"}',
        '{"tool_calls": [{"name": "lmap", "arguments": {}}]}',
        '{"tool_calls": [{"name": "lamp", "arguments": {"level": 3}}]}',
        '<tool_call>\n{"name": "lamp", "arguments": {}}\n</tool_call>',
    ],
)
def test_a_correction_that_means_calls_and_has_none_is_refused(
    correction: str, manifest: Manifest, tmp_path: Path
) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    tools = [{"name": "lamp"}]
    called = log.answered("on", "", calls=[ToolCall("lamp", {})], tools=tools, adapter="command")
    said = log.answered("who", '{"who": "me"}', tools=tools, adapter="command")
    told = (
        "calls no tool; write|no calls of tools; write|did you mean 'lamp'|is the text of a call|lamp break its schema"
    )
    with pytest.raises(UsageError, match=told):
        log.corrected(called, correction)
    log.corrected(called, "which lamp? [the one in the hall]")
    log.corrected(said, '{"who": "you"}')
    assert [entry.correction is None for entry in read_answer_log(log.path, manifest)] == [False, False]


def test_what_was_shown_in_place_of_an_unsure_answer_is_confirmed(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    log.corrected(log.answered("one", "1", shown="2", adapter="command"))
    (entry,) = read_answer_log(log.path, manifest)
    assert (entry.answer, entry.correction, entry.is_wrong) == ("1", "2", True)
    with pytest.raises(UsageError, match="was cut off or a clarifying question, which is not to be learned; give the"):
        log.corrected(log.answered("two", "1", shown="", adapter="command"))


def test_an_answer_that_was_cut_off_is_corrected_but_not_confirmed(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    answer = log.answered("one", "1", adapter="command", is_cut_off=True)
    with pytest.raises(UsageError, match="the answer was cut off, which is not to be learned; give the right answer"):
        log.corrected(answer)
    log.corrected(answer, "12")
    (entry,) = read_answer_log(log.path, manifest)
    assert (entry.is_cut_off, entry.correction) == (True, "12")


def test_nothing_empty_is_confirmed_or_a_correction(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    for answer, correction in (("", None), ("1", "")):
        with pytest.raises(UsageError, match="the right answer is empty, which is not to be learned; give a text"):
            log.corrected(log.answered("one", answer, adapter="command"), correction)


def test_answers_are_in_the_order_of_their_corrections(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    first, second = (log.answered("one", "1", adapter="command") for _ in range(2))
    log.corrected(second, "2")
    log.corrected(first, "3")
    assert [entry.correction for entry in read_answer_log(log.path, manifest)] == ["2", "3"]


def test_others_cannot_read_a_log_that_was_there(manifest: Manifest, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("answers.jsonl", "answers.jsonl.1")]
    for file in files:
        file.touch(0o644)
    AnswerLog(files[0], manifest)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]


def test_a_judgement_stays_where_a_later_line_says_nothing(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    line = log.answered("one", "1", adapter="command")
    before = log.path.read_text()
    log.corrected(line, "2")
    append_lines(log.path, before)
    assert [entry.correction for entry in read_answer_log(log.path, manifest)] == ["2"]


def test_a_correction_stays_where_a_later_line_has_none(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    line = log.answered("one", "1", adapter="command")
    log.wrong(line)
    question = log.path.read_text().splitlines(keepends=True)[-1]
    log.corrected(line, "2")
    for correction in ("null", '""'):
        append_lines(log.path, question.replace('"correction": null', f'"correction": {correction}'))
        assert [entry.correction for entry in read_answer_log(log.path, manifest)] == ["2"]


def test_a_wrong_answer_waits_for_its_correction(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)

    def judged() -> tuple[str | None, bool]:
        (entry,) = read_answer_log(log.path, manifest)
        return entry.correction, entry.is_wrong

    answer = log.answered("one", "1", adapter="command")
    log.corrected(answer)
    assert judged() == ("1", False)
    log.wrong(answer)
    assert judged() == (None, True)
    log.corrected(answer, "2")
    log.wrong(answer)
    assert judged() == ("2", True)
    log.corrected(answer)
    assert judged() == ("1", False)
    with pytest.raises(NotFoundError, match="no answer 'none'"):
        log.wrong("none")


def test_a_line_needs_no_more_than_what_was_answered(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, manifest).answered("one", "1", adapter="command")
    (before,) = read_answer_log(path, manifest)
    line = json.loads(path.read_text())
    for key in ("confidence", "correction", "is_wrong", "tools"):
        del line[key]
    path.write_text(json.dumps(line) + "\n")
    assert read_answer_log(path, manifest) == [before]


@pytest.mark.parametrize("spacing", [None, (",", ":")])
def test_what_an_expression_finds_in_json_is_replaced(
    spacing: tuple[str, str] | None, manifest: Manifest, tmp_path: Path
) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest, redact=[r"\d{6,}", r'"secret": ?"[^"]*"'])
    answer = log.answered("dial", json.dumps({"pin": 654321, "123456": 1}, separators=spacing), adapter="command")
    (entry,) = read_answer_log(log.path, manifest)
    assert entry.answer == f'{{"pin": "{REDACTED}", "{REDACTED}": 1}}'.replace(" ", "" if spacing else " ")
    log.corrected(answer, '{"a": "5551234", "a": "x", "secret": "y"}')
    (entry,) = read_answer_log(log.path, manifest)
    assert entry.correction == f'{{"a": "{REDACTED}", "a": "x", {REDACTED}}}'


def test_what_an_expression_finds_in_json_within_texts_is_replaced(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest, redact=["Müller", r"\bAnna\b"])
    inner = json.dumps({"name": "Müller"})
    talk = [
        {"role": "user", "content": "who"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "find", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "a", "content": json.dumps({"note": "line\nAnna", "n": 1, "text": inner})},
    ]
    log.answered(talk, json.dumps("Müller\nAnna"), adapter="command")
    (entry,) = read_answer_log(log.path, manifest)
    found = json.loads(str(entry.messages[2]["content"]))
    assert (found["note"], found["n"], json.loads(found["text"])) == (f"line\n{REDACTED}", 1, {"name": REDACTED})
    assert json.loads(entry.answer) == f"{REDACTED}\n{REDACTED}"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r'(?m)^\s*"password".*$', json.dumps({"u": "x", "password": "hunter2"}, indent=2)),
        (r'"password":"[^"]*"', '{"u": "x", "password":"hunter2"}'),
        (r'x|"password":"[^"]*"', '{"u": "x", "password":"hunter2"}'),
    ],
)
def test_what_is_found_around_the_values_of_json_is_replaced_whatever_its_form(pattern: str, said: str) -> None:
    text, (cleaned,) = Redaction([pattern]).clean(said, [said])
    assert REDACTED in text and text == cleaned
    assert "hunter2" not in text


@pytest.mark.parametrize("levels", [50, 400, 5000])
def test_what_is_nested_too_deeply_is_redacted_as_a_whole(levels: int) -> None:
    nested = f"{'[' * levels}1, {json.dumps('Müller')}{']' * levels}"
    text, _ = Redaction(["Müller"]).clean(nested)
    assert "Müller" not in str(json.loads(text)) if levels == 50 else text in (REDACTED, nested)


def test_judgements_at_once_are_all_kept(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    names = [log.answered(f"n {number}", "1", adapter="command") for number in range(100)]
    with ThreadPoolExecutor(8) as threads:
        for name in names:
            threads.submit(log.wrong, name)
            threads.submit(log.corrected, name, "2")
    assert {(entry.correction, entry.is_wrong) for entry in read_answer_log(log.path, manifest)} == {("2", True)}


def test_calls_with_one_id_get_numbers_of_their_own(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest)
    call = {"id": "a", "function": {"name": "lamp", "arguments": {}}}
    talk: list[Any] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    talk += [talk[0], talk[1], {"role": "assistant", "tool_calls": [call, {**call, "id": "b"}]}]
    log.answered(talk, "", adapter="command")
    (entry,) = read_answer_log(log.path, manifest)
    calls = [call["id"] for message in entry.messages for call in message.get("tool_calls", ())]
    assert calls == [f"call{number:05d}" for number in range(1, 5)]
    assert [message["tool_call_id"] for message in entry.messages[1::2]] == ["call00001", "call00002"]


def test_a_text_in_which_an_expression_never_ends_is_replaced(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "MAX_S", 1.0)
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest, redact=["(a+)+$"])
    log.answered("a" * 60 + "!", "none", adapter="command")
    (entry,) = read_answer_log(path, manifest)
    assert (entry.messages[0]["content"], entry.answer) == (REDACTED, REDACTED)


def test_texts_that_no_process_can_be_started_for_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with without_free_files():
        cleaned = Redaction(["lamp"]).clean("turn on the lamp", ["off"])
    assert cleaned == (REDACTED, [REDACTED])
    assert "Too many open files" in caplog.text


def test_a_log_has_at_most_its_bytes_and_keeps_the_newest_answers(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest, max_bytes=100_000)
    names = [log.answered(f"question {number} " * 20, "answer", adapter="command") for number in range(500)]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    kept = [entry.id for entry in read_answer_log(path, manifest)]
    assert kept == names[-len(kept) :] and 50 < len(kept) < 500
    with pytest.raises(NotFoundError, match="no answer"):
        log.corrected(names[0], "too late")
    log.corrected(names[-1], "in time")
    assert read_answer_log(path, manifest)[-1].correction == "in time"


def test_a_log_that_was_allowed_more_bytes_loses_its_oldest_answers(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest, max_bytes=400_000)
    names = [log.answered(f"question {number} " * 20, "answer", adapter="command") for number in range(600)]
    log = AnswerLog(path, manifest, max_bytes=100_000)
    names.append(log.answered("play", "answer", adapter="command"))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    kept = [entry.id for entry in read_answer_log(path, manifest)]
    assert kept[-1] == names[-1] and 50 < len(kept) < 300


@pytest.mark.parametrize(
    ("answer", "more", "message"),
    [
        (None, {}, "answer cannot be 'None'"),
        ("on", {"answer_id": 5}, "id cannot be '5'"),
        ("on", {"confidence": "high"}, "confidence cannot be 'high'"),
    ],
)
def test_a_value_of_another_type_is_not_logged(
    answer: Any,  # noqa: ANN401 - also of a wrong type
    more: dict[str, Any],
    message: str,
    manifest: Manifest,
    tmp_path: Path,
) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, manifest)
    with pytest.raises(UsageError, match=f"it cannot be logged: {message}; give texts"):
        log.answered("turn on", answer, adapter="command", **more)
    assert path.read_text() == ""


def test_a_file_beside_the_log_that_is_not_the_one_before_it_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    path, notes = tmp_path / "notes", tmp_path / "notes.1"
    notes.write_text("my own notes\n" * 8000)
    notes.chmod(0o644)
    with pytest.raises(UsageError, match=r"notes\.1 is not a log of answers; choose another file"):
        AnswerLog(path, manifest, max_bytes=100_000)
    assert (notes.stat().st_size, notes.stat().st_mode & 0o777, path.exists()) == (13 * 8000, 0o644, False)
    notes.unlink()
    notes.mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*notes\.1: Is a directory; choose another file"):
        AnswerLog(path, manifest)
    os.mkfifo(path)
    with pytest.raises(UsageError, match="notes is not a log of answers; choose another file"):
        AnswerLog(path, manifest)


def test_a_log_behind_a_link_keeps_its_newest_answers_there(manifest: Manifest, tmp_path: Path) -> None:
    link, disk = tmp_path / "answers.jsonl", tmp_path / "disk"
    disk.mkdir()
    link.symlink_to("disk/real.jsonl")
    log = AnswerLog(link, manifest, max_bytes=100_000)
    names = [log.answered(f"question {number} " * 20, "answer", adapter="command") for number in range(500)]
    assert link.is_symlink() and {*tmp_path.iterdir()} == {link, disk}
    assert {file.name for file in disk.iterdir()} == {"real.jsonl", "real.jsonl.1"}
    assert sum(file.stat().st_size for file in disk.iterdir()) <= 100_000
    kept = [entry.id for entry in read_answer_log(link, manifest)]
    assert kept == names[-len(kept) :] and len(kept) > (disk / "real.jsonl").read_bytes().count(b"\n")
    (disk / "real.jsonl").unlink()
    assert read_answer_log(link, manifest)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(UsageError, match="cannot write"):
        AnswerLog(link, manifest)


def test_an_answer_that_is_too_long_is_left_out_with_a_warning(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest, max_bytes=100_000)
    log.corrected(log.answered("z", "y" * 3000, adapter="command"))
    log.answered("x" * 60_000, "y", adapter="command")
    assert "did not log an answer of 60" in caplog.text
    # Longer than a tenth of the log, and yet the newest.
    answer = log.answered("z" * 12_000, "y", adapter="command")
    log.corrected(answer, "right")
    with pytest.raises(UsageError, match="did not log an answer of 62"):
        log.corrected(answer, "x" * 50_000)
    assert [entry.correction for entry in read_answer_log(log.path, manifest)][1:] == ["right"]


def test_a_full_disk_ends_no_answer(manifest: Manifest, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AnswerLog(small_disk / "answers.jsonl", manifest)
    for number in range(40):
        log.answered("x" * 100_000, str(number), adapter="command")
    assert "cannot log an answer" in caplog.text
    with pytest.raises(OutOfSpaceError, match="cannot log an answer in"):
        log.corrected(log.answered("y" * 100_000, "1", adapter="command"))


def test_a_part_of_a_line_is_left_out(manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    first = AnswerLog(path, manifest).answered("one", "1", adapter="command")
    with path.open("a") as file:
        file.write('{"id": "torn')
    second = AnswerLog(path, manifest).answered("two", "2", adapter="command")
    with caplog.at_level(logging.WARNING):
        assert [entry.id for entry in read_answer_log(path, manifest)] == [first, second]
    assert "not JSON, such as cut-off ones: " in caplog.text and "answers.jsonl:2" in caplog.text


def test_many_lines_that_are_left_out_are_one_sentence(manifest: Manifest, tmp_path: Path) -> None:
    path, said = tmp_path / "answers.jsonl", list[str]()
    path.write_text("junk\n\n" * 2000)
    assert read_answer_log(path, manifest, said.append) == []
    (sentence,) = said
    assert sentence.endswith("answers.jsonl:1; " + f"{path}:3; {path}:5 and 1997 more")


@pytest.mark.parametrize(("correction", "text"), [(True, "true"), (7, "7"), ([1], "[1]"), ("on", "on"), (None, None)])
def test_a_correction_can_be_any_json(correction: object, text: str | None, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, manifest).answered("one", "1", adapter="command")
    path.write_text(json.dumps({**json.loads(path.read_text()), "correction": correction}) + "\n")
    assert [entry.correction for entry in read_answer_log(path, manifest)] == [text]


def test_a_correction_is_logged_as_its_json(manifest: Manifest, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl", manifest, redact=["Anna"])
    answer = log.answered("call Anna", "{}", adapter="command")
    log.corrected(answer, {"name": "Anna", "to": ["dömö"]})
    (entry,) = read_answer_log(log.path, manifest)
    assert entry.correction == f'{{"name": "{REDACTED}", "to": ["dömö"]}}'
    with pytest.raises(UsageError, match=r"neither a text nor JSON: .*set.*; give a text, an object or a list"):
        log.corrected(answer, {"name"})  # type: ignore[arg-type]


def test_the_log_of_another_bundle_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, manifest).answered("one", "1", adapter="command")
    with pytest.raises(UsageError, match="not of 'garden'"):
        read_answer_log(path, replace(manifest, name="garden"))
    with pytest.raises(UsageError, match="give the log of this bundle"):
        read_answer_log(path, replace(manifest, base=replace(manifest.base, fingerprint="ab" * 32)))
    for folder in (tmp_path, Path(), Path("/")):
        with pytest.raises(UsageError, match="is a folder; give the log, a file in it"):
            read_answer_log(folder, manifest)
        with pytest.raises(UsageError, match=r"cannot write .*: Is a directory; choose another file"):
            AnswerLog(folder, manifest)
    with pytest.raises(NotFoundError, match="no log"):
        read_answer_log(tmp_path / "none.jsonl", manifest)


def test_lines_of_another_base_are_left_out_and_counted(manifest: Manifest, tmp_path: Path) -> None:
    path, said = tmp_path / "answers.jsonl", list[str]()
    other = replace(manifest, base=replace(manifest.base, fingerprint="ab" * 32))
    for each in (manifest, other, other):
        AnswerLog(path, each).answered("one", "1", adapter="command")
    assert len(read_answer_log(path, manifest, said.append)) == 1
    assert len(read_answer_log(path, other, said.append)) == 2
    assert said[0].startswith(f"left out 2 lines of other bundles: {path}:2 is of bundle 'home' on base abababab")
    assert said[1].startswith(f"left out 1 lines of other bundles: {path}:1 is")


def test_a_log_that_is_renamed_while_it_is_read_is_read_again(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before, read = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.1", Path.read_bytes
    log = AnswerLog(path, manifest)
    names = [log.answered("one", "1", adapter="command")]
    path.rename(before)
    assert [entry.id for entry in read_answer_log(path, manifest)] == names
    names = [log.answered(text, "1", adapter="command") for text in ("two", "three")]

    def renamed(file: Path) -> bytes:
        content = read(file)
        if file == before and "three" not in content.decode():
            path.rename(before)
        return content

    monkeypatch.setattr(Path, "read_bytes", renamed)
    assert [entry.id for entry in read_answer_log(path, manifest)] == names


@pytest.mark.parametrize(
    "change",
    [
        {"answer": 1},
        {"messages": "text"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"confidence": "high"},
        {"more": 1},
        {"id": None},
        {"tools": {}},
        {"is_wrong": "yes"},
    ],
)
def test_a_line_that_is_not_one_of_a_log_is_refused(
    manifest: Manifest, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, manifest).answered("one", "1", adapter="command")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    with pytest.raises(VerificationError, match=r"answers\.jsonl:1 is not a line of a log"):
        read_answer_log(path, manifest)


def test_invalid_options_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    other = tmp_path / "manifest.json"
    other.write_text('{"name": "home"}')
    with pytest.raises(UsageError, match=r"manifest\.json is not a log of answers; choose another file"):
        AnswerLog(other, manifest)
    assert other.read_text() == '{"name": "home"}'
    for torn in ('{"id', '{"id\n', "\n", "\0\0\n" + '{"id": "a", "ti\n'):
        other.write_text(torn)
        AnswerLog(other, manifest)
    with pytest.raises(UsageError, match="cannot write"):
        AnswerLog(tmp_path / "none" / "answers.jsonl", manifest)
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression"):
        AnswerLog(tmp_path / "answers.jsonl", manifest, redact=["("])
    for redact in ("abc", [3]):
        with pytest.raises(UsageError, match=r"redact is .*; give a list of regular expressions"):
            AnswerLog(tmp_path / "answers.jsonl", manifest, redact=redact)  # type: ignore[arg-type]
    assert AnswerLog(str(other), manifest).path == other
    with pytest.raises(UsageError, match="at least 100000"):
        AnswerLog(tmp_path / "answers.jsonl", manifest, max_bytes=10)
