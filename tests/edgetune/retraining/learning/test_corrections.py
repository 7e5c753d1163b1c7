"""Corrected answers as rows: of texts, and of calls of tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, ToolCall
from edgetune_runtime.answer_log.answers import LoggedAnswer
from edgetune_runtime.answer_log.log import AnswerLog
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import BaseEntry, Manifest, read_manifest
from edgetune_runtime.errors import UsageError
from recipes import NAME, PLAIN, adapter_of, make_recipe
from trainings import QUIET

from edgetune.building.pipeline import build
from edgetune.retraining.learning.corrections import corrected_rows
from edgetune.retraining.learning.learn import learn, read_logs
from edgetune.retraining.learning.questions import ask
from edgetune.retraining.learning.rows import TooFewCorrectionsError, doubts, learned_rows
from edgetune.tasks.data import TaskRow
from edgetune.tasks.splitting import conversations
from edgetune.tasks.task import Task, read_task

LAMP = {
    "type": "object",
    "properties": {"state": {"enum": ["on", "off"]}},
    "required": ["state"],
    "additionalProperties": False,
}
MANIFEST = Manifest("home", BaseEntry("tiny", "", "llama", "q8_0", 1, 64, 2, 0, "", "", {}), {}, {}, context_length=256)
TOOLS: list[Any] = [{"name": "lamp", "parameters": LAMP}]


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def called(state: str, **ids: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**ids, "function": {"name": "lamp", "arguments": {"state": state}}}],
    }


def call_text(state: str, name: str = "lamp") -> str:
    return json.dumps({"tool_calls": [{"name": name, "arguments": {"state": state}}]})


ROWS = [
    {"messages": [asked(f"lamp {n} {state}"), called(state)], "tools": TOOLS}
    for n in range(12)
    for state in ("on", "off")
]


def task_of(folder: Path) -> Task:
    data = {"train": "rows.jsonl", "held_out": 0.2}
    return read_task("home", make_recipe(folder, "missing.gguf", {"home": {"data": data}}, data={"rows.jsonl": ROWS}))


def logged(number: int, messages: list[dict[str, Any]], correction: str, tools: list[Any] | None) -> LoggedAnswer:
    offered = None if tools is None else tuple(tools)
    return LoggedAnswer(
        f"a{number}", "", "home", "", "home", tuple(messages), "?", correction=correction, tools=offered
    )


def test_corrected_calls_become_rows_with_their_tools(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    entries = [logged(n, [asked(f"light {n}")], call_text("on"), TOOLS) for n in range(5)]
    rows = learned_rows(task, entries)
    (row,) = [row for row in rows.train if row.where == "log:a1"]
    assert row.tools == task.train[0].tools
    assert row.turn is not None and row.turn["tool_calls"][0]["function"]["arguments"] == {"state": "on"}
    assert (len(rows.held_out), rows.learned) == (2, 3)
    old = task.train[0]
    other = "off" if '"on"' in str(old.completion) else "on"
    rows = learned_rows(task, [*entries, logged(9, [dict(old.messages[0])], call_text(other), TOOLS)])
    assert old.where not in {row.where for row in rows.train}
    assert list(doubts(task, rows)) == []


def test_ids_of_calls_tell_no_prompts_apart(tmp_path: Path) -> None:
    result = {"role": "tool", "content": "done"}
    talk = [asked("lamp on"), called("on", id="123456789"), {**result, "tool_call_id": "123456789"}, asked("again")]
    other = [asked("lamp on"), called("on"), result, asked("again")]
    first, second = corrected_rows(
        task_of(tmp_path), [logged(n, each, call_text("on"), TOOLS) for n, each in enumerate((talk, other))]
    )[0]
    assert first.messages != second.messages
    assert first.prompt_key == second.prompt_key


def test_a_correction_that_calls_what_there_is_not_is_refused(tmp_path: Path) -> None:
    bad = [call_text("on", "lmap"), call_text("dim"), '{"tool_calls": 1}']
    entries = [logged(n, [asked(f"light {n}")], text, TOOLS) for n, text in enumerate(bad)]
    with pytest.raises(UsageError) as refused:
        corrected_rows(task_of(tmp_path), entries)
    unknown, broken, malformed = str(refused.value).splitlines()
    assert unknown.startswith("answer a0 to 'light 0': the correction ")
    assert unknown.endswith("cannot be an answer: 'lmap' is not one of the tools; did you mean 'lamp'?")
    assert f"the arguments of lamp break its schema: {call_text('dim')!r}; correct them" in broken
    assert 'has no calls of tools; write calls as {"tool_calls": [{"name": NAME, "arguments": {…}}]}' in malformed
    # That there is nothing to call is said in words.
    plain = [logged(1, [asked("light")], "no idea", tools) for tools in (TOOLS, None)]
    assert [row.completion for row in corrected_rows(task_of(tmp_path), plain[:1])[0]] == ["no idea"]
    with pytest.raises(UsageError, match="'no idea' is not an answer that the metric json can score; answer"):
        corrected_rows(task_of(tmp_path), plain[1:])


def test_conversations_that_cannot_be_rows_are_left_out_and_named(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    odd = logged(7, [asked("hello"), asked("light")], call_text("on"), TOOLS)
    with pytest.raises(
        TooFewCorrectionsError, match="fewer than 4; left out: log:a7: message 2 has role user, expected assistant"
    ):
        learned_rows(task, [odd])
    rows = learned_rows(task, [odd, *(logged(n, [asked(f"light {n}")], call_text("on"), TOOLS) for n in range(4))])
    assert list(doubts(task, rows)) == ["left out log:a7: message 2 has role user, expected assistant"]


def test_of_a_conversation_only_the_corrected_answer_is_learned(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    talks = [[asked(f"light {n}"), called("off"), {"role": "tool", "content": ""}, asked("again")] for n in range(4)]
    rows = learned_rows(task, [logged(n, talk, call_text("on"), TOOLS) for n, talk in enumerate(talks)])
    for row in (*rows.held_out, *(row for row in rows.train if row.where.startswith("log:"))):
        assert [answer.completion for answer in row.answers] == [call_text("on")]
    # Nor is a call of a training row that a correction contradicts.
    old = TaskRow("x:1", tuple(talks[0]), "done").with_turns([*talks[0], called("on")])
    old = replace(old, tools=task.train[0].tools)
    first = logged(9, talks[0][:1], call_text("on"), TOOLS)
    more = [logged(n, [asked(f"light {n}")], call_text("on"), TOOLS) for n in range(1, 4)]
    (taught,) = [row for row in learned_rows(replace(task, train=[*task.train, old]), [first, *more]).train
                 if row.where == "x:1"]  # fmt: skip
    assert [answer.where for answer in taught.answers] == ["x:1"]
    assert taught.prompt_key == old.prompt_key


def test_a_logged_conversation_takes_the_place_of_the_row(tmp_path: Path) -> None:
    talk = [asked("lamp on"), called("on"), {"role": "tool", "content": "done"}, asked("again")]
    rows = [*ROWS, {"messages": [*talk, called("off")], "tools": TOOLS}]
    data = {"train": "rows.jsonl", "validation": "more.jsonl"}
    files = {"rows.jsonl": rows, "more.jsonl": ROWS}
    recipe = make_recipe(tmp_path, "missing.gguf", {"home": {"data": data}}, data=files)
    log = AnswerLog(tmp_path / "answers.jsonl", MANIFEST)
    for messages in (*([asked(f"light {n}")] for n in range(3)), talk):
        answer = log.answered(messages, "", calls=[ToolCall("lamp", {"state": "off"})], tools=TOOLS, adapter="home")
        log.corrected(answer, call_text("on"))
    learned = learned_rows(read_task("home", recipe), read_answer_log(log.path, MANIFEST))
    assert [row.completion for row in learned.train if row.prompt == "again"] == [call_text("on")]


def test_corrections_are_written_as_the_rows_are(tmp_path: Path) -> None:
    rows = [{"prompt": f"lamp {n}", "completion": f'{{"n":{n},"on":true}}'} for n in range(20)]
    adapters = {"home": {"data": {"train": "rows.jsonl"}}}
    recipe = make_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows})
    entry = logged(1, [asked("lamp")], '{"n": 7, "on": true}', None)
    assert [row.completion for row in corrected_rows(read_task("home", recipe), [entry])[0]] == ['{"n":7,"on":true}']


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_numbers_that_json_cannot_have_are_refused(number: str, tools: list[Any] | None, tmp_path: Path) -> None:
    text = f'{{"tool_calls": [{{"name": "lamp", "arguments": {{"state": {number}}}}}]}}'
    entry = logged(1, [asked("lamp")], text, tools)
    told = "has a number that is not finite, which JSON cannot have; give a finite number"
    with pytest.raises(UsageError, match=told):
        entry.with_correction(text)
    with pytest.raises(UsageError, match=r"answer a1 to 'lamp': the correction .* cannot be an answer: .* not finite"):
        corrected_rows(task_of(tmp_path), [entry])
    assert entry.with_correction(number).correction == number


def test_spaces_around_a_label_are_nobodys(tmp_path: Path) -> None:
    rows = [{"text": f"make it {color} {n}", "label": color} for n in range(8) for color in ("red", "warm")]
    adapters = {"home": {"data": {"train": "rows.jsonl"}}}
    task = read_task("home", make_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": rows}))
    (row,), _ = corrected_rows(task, [logged(1, [asked("lamp")], " warm\n", None)])
    assert row.completion == "warm"


def test_what_is_nobodys_mistake_stops_nothing(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    swapped = json.dumps({"tool_calls": [{"name": "lamp", "arguments": {"area": "hall", "state": "on"}}]})
    properties = {"state": LAMP["properties"]["state"], "area": {"type": "string"}}
    tools = [{"name": "lamp", "parameters": {**LAMP, "properties": properties}}]
    hello = replace(logged(2, [asked("hi")], "Hello!", None), answer="Hello!")
    hidden = logged(3, [asked("[redacted]")], "[redacted]", None)
    rows, left_out = corrected_rows(task, [logged(1, [asked("lamp")], swapped, tools), hello, hidden])
    (row,) = rows
    assert '{"state": "on", "area": "hall"}' in (row.completion or "")
    assert "is not an answer that the metric json can score" in left_out[0]
    assert left_out[1].endswith("was redacted as a whole, or what was asked")


def test_prompts_that_were_redacted_as_a_whole_are_left_out(tmp_path: Path) -> None:
    entries = [logged(n, [asked(text)], call_text("on"), TOOLS) for n, text in enumerate(("[redacted]", "[redacted]!"))]
    (row,), (left_out,) = corrected_rows(task_of(tmp_path), entries)
    assert row.where == "log:a1"
    assert left_out.endswith("was redacted as a whole, or what was asked")


def test_the_tasks_own_system_prompt_makes_no_other_prompt(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "held_out": 0.2}
    adapters = {"home": {"data": data, "system": "You control lamps."}}
    task = read_task("home", make_recipe(tmp_path, "missing.gguf", adapters, data={"rows.jsonl": ROWS}))
    talks = [[{"role": "system", "content": text}, asked("lamp 1 on")] for text in ("You control lamps.", "Be brief.")]
    entries = [logged(n, talk, call_text("on"), TOOLS) for n, talk in enumerate(talks)]
    first, second = corrected_rows(task, entries)[0]
    assert first.prompt_key in {row.prompt_key for row in (*task.train, *task.validation)}
    assert second.system == "Be brief." and second.prompt_key != first.prompt_key


def test_answers_that_are_not_right_without_what_was_redacted_are_left_out(tmp_path: Path) -> None:
    entry = logged(1, [asked("lamp")], call_text("[redacted]"), TOOLS)
    code = [logged(n, [asked(text)], '"[redacted]"', None) for n, text in enumerate(("which code", "[redacted] is it"))]
    (row,), (call, answer) = corrected_rows(task_of(tmp_path), [entry, *code])
    assert row.prompt == "[redacted] is it"
    assert call.endswith("cannot be an answer: the arguments of lamp break its schema, or come in another order")
    assert answer.endswith("has a redacted value that no message has")


def test_texts_after_a_result_are_learned_and_not_compared_where_any_is_right(tmp_path: Path) -> None:
    task, told = task_of(tmp_path), {"role": "tool", "name": "lamp", "content": "broken"}
    entries = [logged(n, [asked(f"dim {n}"), called("on"), told], f"{n} is broken.", TOOLS) for n in range(8)]
    again = {**told, "content": "Broken!"}
    entries.append(logged(7, [asked("dim 0"), called("on"), again], call_text("off"), TOOLS))
    entries += [logged(n, [asked(f"dim {n}")], call_text("on"), TOOLS) for n in range(8, 12)]
    rows = learned_rows(task, entries)
    assert task.metric == "json" and [row.where for row in rows.held_out] == ["log:a8"] and rows.learned == 12
    doubt = next(iter(doubts(task, rows)))
    assert "8 corrections, such as log:a0, are learned, but not compared: any text is right after" in doubt


def test_several_corrected_answers_of_a_conversation_count_as_one_row(tmp_path: Path) -> None:
    task, talk, entries = task_of(tmp_path), list[dict[str, Any]](), list[LoggedAnswer]()
    for number in range(16):
        talk = [*talk, asked(f"dim {number}")]
        entries.append(logged(number, talk, call_text("on"), TOOLS))
        talk = [
            *talk,
            called("on", id=f"c{number}"),
            {"role": "tool", "tool_call_id": f"c{number}", "content": "ok"},
            {"role": "assistant", "content": "Done."},
        ]
    rows = learned_rows(task, entries)
    assert [row.where for row in rows.held_out] == ["log:a0", "log:a4", "log:a8", "log:a12"]
    assert conversations(rows.held_out) == ["log:a0"] * 4


def test_an_answer_is_asked_about_with_the_result_that_it_is_about() -> None:
    result = {"role": "tool", "name": "lamp", "content": "broken"}
    entry = replace(logged(0, [asked("dim it"), called("on"), result], "", TOOLS), answer="Done.", correction=None)
    shown = list[str]()
    assert not [*ask([entry], lambda question: shown.append(question) or "q\n", MANIFEST)]
    assert f"asked     dim it → {call_text('on')} → broken\n  answered  Done." in shown[0]


def test_calls_are_learned_from_a_log(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    adapters = {"lamp": adapter_of(train="lamp.jsonl", **PLAIN)}
    training = {"max_steps": 40, "evals": 2, "learning_rate": 1e-2}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"lamp.jsonl": ROWS}, training=training)
    home = tmp_path / "home"
    build(recipe, home, progress=QUIET)
    log = AnswerLog(tmp_path / "answers.jsonl", read_manifest(home))
    for number in range(8):
        prompt = f"light {number} please"
        answer = log.answered(prompt, "", calls=[ToolCall("lamp", {"state": "off"})], tools=TOOLS, adapter="lamp")
        log.corrected(answer, call_text("on"))
    result = learn(home, read_logs(home, [log.path], QUIET.say), tmp_path / NAME, tmp_path / "new", QUIET)
    assert result.learned == {"lamp": 6}
    assert result.changes["lamp"]["corrections"].after == 1.0
    with Runtime.open(tmp_path / "new", disk_mb=0) as runtime:
        reply = runtime.generate("light 1 please", adapter="lamp", tools=TOOLS, max_tokens=60)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("lamp", {"state": "on"})]
