"""The home assistant: its rows are valid calls for existing devices, prompts are short, and a bundle answers tasks."""

from __future__ import annotations

import asyncio
import json
import random
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ollama
import pytest
from assist.calls import TOOLS, expand, offered, open_schema, shorten
from assist.devices import Device, Home, listing, read_devices, read_home
from assist.pick import is_question, pick
from assist.prompt import Request, rewrite
from assist.words import alike, share_said, spoken
from edgetune_runtime import Runtime
from edgetune_runtime.decoding.library import byte_tokenizer, library
from edgetune_runtime.decoding.output import output_of, spec_of
from edgetune_runtime.server.rewriting import Rewriter
from generator import replies
from generator.homes import invent, load_home
from generator.rows import normal, rows
from generator.speech import in_words
from generator.templates import is_held_out, sentences
from recipes import write_rows
from runtime.server.conftest import started

from edgetune.cli.main import main as edgetune

EXAMPLE = Path(__file__).parents[2] / "examples" / "home-assistant"
ALL_TOOLS = [{"type": "function", "function": {"name": tool.name}} for tool in TOOLS.values()]
INTRODUCTION = (
    "You are a voice assistant.\n\nStatic Context: An overview of the areas and the devices in this smart home:\n"
)
LAMPS = (
    Device(("Desk Lamp",), "light", ("Study",)),
    Device(("Wall Lamp", "Sconce"), "light", ("Hall", "Corridor")),
    Device(("Front Door",), "lock", ("Hall",)),
    Device(("Tea Kettle",), "switch", ("Kitchen",)),
    Device(("Groceries",), "todo"),
)
CALLS = [{"id": "1", "function": {"name": "HassTurnOn", "arguments": {"name": "Desk Lamp", "domain": ["light"]}}}]


def system_of(home: Home) -> str:
    """A system prompt with the devices of a home and the area of the microphone, as Home Assistant writes it."""
    here = f"You are in area {home.here} and all generic commands should target this area.\n" if home.here else ""
    return INTRODUCTION + listing(home.devices) + "\n" + here


def ask(home: Home, *messages: dict[str, Any] | str, tools: Sequence[dict[str, Any]] = ALL_TOOLS) -> Request:
    """The rewritten request for messages after the system prompt; a text is what the user says."""
    said = [{"role": "user", "content": text} if isinstance(text, str) else text for text in messages]
    return rewrite([{"role": "system", "content": system_of(home)}, *said], tools)


def homes() -> list[Home]:
    rng = random.Random(5)
    return [load_home(EXAMPLE / "home.yaml"), *(invent(rng) for _ in range(6))]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_a_row_is_what_the_request_of_home_assistant_becomes_and_its_answer_fits_the_schema(number: int) -> None:
    home = homes()[number]
    for place, row in enumerate(islice(rows(f"rows {number}", home, 1.0, training=True), 15)):
        *lines, sentence = row["prompt"].split("\n")
        if any(line.startswith("before: ") for line in lines):
            continue
        tools = [tool for tool in ALL_TOOLS if "no timers" not in lines or "Timer" not in tool["function"]["name"]]
        tools = tools if "no timers" not in lines else [*tools, {"function": {"name": "HassCancelAllTimers"}}]
        request = ask(home, sentence.removeprefix("> "), tools=tools)
        assert request.prompt == row["prompt"]
        if place == 0:
            assert output_of(schema=request.schema).accepts(row["completion"]), row
        # Like `accepts`, but for the process that compiles each schema within limits first.
        matcher = library().LLMatcher(byte_tokenizer(), spec_of(schema=request.schema).grammar)
        assert matcher.consume_tokens(list(row["completion"].encode())) and matcher.is_accepting(), row


@pytest.fixture(scope="module")
def many_rows() -> list[dict[str, str]]:
    """Rows about fifty invented homes, which take over a second to make."""
    return list(islice(rows("many", None, 0, training=True), 400))


def test_rows_name_only_devices_and_areas_that_the_prompt_has(many_rows: list[dict[str, str]]) -> None:
    for row in many_rows:
        answer = json.loads(row["completion"])
        for call in answer if isinstance(answer, list) else []:
            if call["call"] not in {"StartTimer", "CancelTimer", "TimerStatus"}:
                assert all(call[key] in row["prompt"] for key in ("name", "area", "floor") if key in call), row


def test_the_answers_of_all_rows_fit_the_schema_of_the_adapter(many_rows: list[dict[str, str]]) -> None:
    schema = output_of(schema=open_schema(), spacing="spaced")
    for row in many_rows:
        assert schema.accepts(row["completion"]), row


@pytest.mark.slow
def test_every_tool_and_every_kind_of_answer_is_in_the_rows() -> None:
    missing = {*TOOLS, "ask", "missing", "talk"}
    made = rows("tools", load_home(EXAMPLE / "home.yaml"), 0.3, training=True)
    for row in islice(made, 2500):
        answer = json.loads(row["completion"])
        kinds = {call["call"] for call in answer} if isinstance(answer, list) else set(answer)
        assert kinds <= {*TOOLS, "ask", "missing", "talk"}
        missing -= kinds
        if not missing:
            break
    assert not missing


def test_the_same_seed_gives_the_same_rows_and_another_gives_others() -> None:
    def made(seed: str) -> list[dict[str, str]]:
        return list(islice(rows(seed, None, 0, training=True), 20))

    assert made("a") == made("a") != made("b")


def test_excluded_sentences_do_not_occur() -> None:
    said = {normal(row["prompt"].rpartition("> ")[2]) for row in islice(rows("x", None, 0, training=True), 100)}
    again = islice(rows("x", None, 0, training=True, excluded=said), 100)
    assert not said & {normal(row["prompt"].rpartition("> ")[2]) for row in again}


def test_some_templates_of_each_large_group_are_kept_out_of_training() -> None:
    templates = [text for kind in sentences()["orders"].values() for text in kind["say"]]
    assert 0.05 < sum(map(is_held_out, templates)) / len(templates) < 0.2


def test_the_home_is_read_as_home_assistant_lists_it() -> None:
    for home in homes():
        assert read_home(system_of(home)) == home


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("devices: [", "while parsing a flow node"),
        ("", "has no devices"),
        ("devices: x", "has no list of devices"),
        ("devices: [{domain: light}]", "device 1 has no name"),
        ("devices: [{name: Lamp, domain: lights}]", "'Lamp' has the domain 'lights'; use one of: light, switch"),
        ("devices: [{name: Lamp, domain: light, area: Den}]", "'Lamp' is in the area 'Den'; add it under `areas`"),
    ],
)
def test_a_wrong_home_is_one_line(text: str | None, told: str, tmp_path: Path) -> None:
    home = tmp_path / "home.yaml"
    if text is not None:
        home.write_text(text)
    with pytest.raises(SystemExit, match=re.escape(f"{home}: ") + ".*" + re.escape(told)):
        load_home(home)


def test_a_list_that_is_no_yaml_is_read_line_by_line() -> None:
    text = "home:\n- names: Nora's: Lamp\n  domain: light\n  areas: Hall\n- names: 'Fan'\n  domain: fan\n\nThat is all."
    assert read_devices(text) == (Device(("Nora's: Lamp",), "light", ("Hall",)), Device(("Fan",), "fan"))


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("desk lamp on", ["Desk Lamp"]),
        ("turn on the desc lmap in the stduy", ["Desk Lamp"]),
        ("light in the corridor", ["Wall Lamp"]),
        ("turn on the sconce", ["Wall Lamp"]),
        ("teakettle on", ["Tea Kettle"]),
        ("all lights off", ["Desk Lamp", "Wall Lamp"]),
        ("we need milk on the list", ["Groceries"]),
    ],
)
def test_the_devices_that_a_sentence_is_about_are_picked(sentence: str, names: list[str]) -> None:
    picked = [device.name for device in pick(Home(LAMPS), sentence)]
    assert set(names) <= set(picked)
    assert "Groceries" not in picked or "Groceries" in names


def test_a_large_home_gives_a_short_prompt_with_the_device_that_is_named() -> None:
    lights = tuple(Device((f"Lamp {number}",), "light", (f"Room {number}",)) for number in range(200))
    assert len(pick(Home(lights), "turn on the lights")) == 10
    assert [device.name for device in pick(Home(lights), "turn on lamp 150")] == ["Lamp 150"]


@pytest.mark.parametrize(
    ("sentence", "asks"),
    [("is the lamp on", True), ("What's the time", True), ("can you turn on the lamp", False), ("lamp off", False)],
)
def test_questions_are_told_from_orders(sentence: str, asks: bool) -> None:
    assert is_question(sentence) == asks


def test_words_are_compared_in_spite_of_typos_plurals_and_numbers() -> None:
    assert share_said("Bedroom 2 Lights", spoken("bed room two light")) == 1
    assert alike("curtain", "cutain")
    assert not alike("lock", "dock")
    assert not alike("12345", "12346")


def test_calls_are_those_that_home_assistant_takes() -> None:
    home = Home(LAMPS)
    calls = [
        {"call": "TurnOn", "domain": "light", "name": "Desk Lamp"},
        {"call": "ListAddItem", "name": "Groceries", "item": "tea"},
    ]
    assert ask(home, "desk lamp on and tea on the list").reply(json.dumps(calls)).calls == (
        {"name": "HassTurnOn", "arguments": {"name": "Desk Lamp", "domain": ["light"]}},
        {"name": "HassListAddItem", "arguments": {"name": "Groceries", "item": "tea"}},
    )


def test_arguments_that_the_tool_does_not_list_are_left_out() -> None:
    tools = offered([{"name": "GetLiveContext", "parameters": {"properties": {"name": {}}}}])
    call = {"call": "GetLiveContext", "domain": "light", "name": "Desk Lamp"}
    assert expand(call, Home(LAMPS), tools) == {"name": "GetLiveContext", "arguments": {"name": "Desk Lamp"}}


def test_a_short_call_is_the_same_after_a_turn(many_rows: list[dict[str, str]]) -> None:
    for row in many_rows:
        answer = json.loads(row["completion"])
        for call in answer if isinstance(answer, list) else []:
            sent = expand(call, Home(()), {})
            assert shorten(sent["name"], sent["arguments"]) == call


def test_a_script_that_home_assistant_offers_as_a_tool_is_a_device_and_called_as_that_tool() -> None:
    tools = [*ALL_TOOLS, {"function": {"name": "good_night"}}]
    request = ask(Home(LAMPS), "run good night", tools=tools)
    assert "script Good Night" in request.prompt
    answer = '[{"call": "TurnOn", "domain": "script", "name": "Good Night"}]'
    fits = output_of(schema=request.schema).accepts
    assert fits(answer)
    assert request.reply(answer).calls == ({"name": "good_night", "arguments": {}},)
    for other in (answer.replace("TurnOn", "TurnOff"), answer.replace("TurnOn", "GetLiveContext")):
        assert not fits(other)
        assert request.reply(other).calls[0]["name"] != "good_night"


def test_only_offered_tools_and_existing_devices_fit_the_schema() -> None:
    request = ask(Home(LAMPS), "lamp on", tools=[{"name": "HassTurnOn"}])
    fits = output_of(schema=request.schema).accepts
    assert fits('[{"call": "TurnOn", "domain": "light", "name": "Desk Lamp"}]')
    assert not fits('[{"call": "TurnOff", "domain": "light", "name": "Desk Lamp"}]')
    assert not fits('[{"call": "TurnOn", "domain": "light", "name": "Lava Lamp"}]')


def test_a_question_names_the_devices_to_choose_from_and_comes_back_in_the_next_turn() -> None:
    home = Home(LAMPS)
    question = ask(home, "lamp on").reply('{"ask": "light"}').text
    assert question == "Which light do you mean: Desk Lamp in Study, Wall Lamp in Hall?"
    request = ask(home, "lamp on", {"role": "assistant", "content": question}, "the one in the study")
    assert 'before: lamp on = {"ask": "light"}' in request.prompt


def test_the_calls_of_the_turn_before_are_in_the_prompt() -> None:
    results = {"role": "tool", "content": '{"response_type": "action_done"}'}
    done = [{"role": "assistant", "tool_calls": CALLS}, results, {"role": "assistant", "content": "Done."}]
    request = ask(Home(LAMPS), "desk lamp on", *done, "and the sconce")
    assert 'before: desk lamp on = [{"call": "TurnOn", "domain": "light", "name": "Desk Lamp"}]' in request.prompt
    assert "Wall Lamp" in request.prompt


def test_results_go_to_the_reply_adapter_with_the_states_that_are_asked_for() -> None:
    states = listing([Device(("Desk Lamp",), "light", ("Study",), "on", {"brightness": "128"})])
    calls = [{"function": {"name": "GetLiveContext", "arguments": '{"name": "Desk Lamp"}'}}]
    result = {"role": "tool", "content": json.dumps({"success": True, "result": f"Live Context:\n{states}"})}
    request = ask(Home(LAMPS), "is the desk lamp on", {"role": "assistant", "tool_calls": calls}, result)
    assert request.adapter == "reply"
    assert request.schema is None
    assert "light Desk Lamp (Study): on, brightness 50" in request.prompt


def test_each_result_is_paired_with_its_own_call_also_after_a_script() -> None:
    calls = [{"function": {"name": "good_night", "arguments": {}}}, *CALLS]
    results = [{"role": "tool", "content": json.dumps(result)} for result in ({"success": True}, FAILED)]
    request = ask(Home(LAMPS), "good night, and desk lamp on", {"role": "assistant", "tool_calls": calls}, *results)
    assert request.prompt.split("\n")[:2] == [
        '{"call": "?"} = done',
        '{"call": "TurnOn", "domain": "light", "name": "Desk Lamp"} = error: the lamp does not answer',
    ]


def test_results_in_another_order_are_paired_with_their_calls_by_id() -> None:
    calls = [{**call, "id": f"call-{number}"} for number, call in enumerate([*CALLS, *CALLS])]
    done, failed = (
        {"role": "tool", "tool_call_id": f"call-{number}", "content": json.dumps(result)}
        for number, result in enumerate(({"success": True}, FAILED))
    )
    called = {"role": "assistant", "tool_calls": calls}
    in_order = ask(Home(LAMPS), "desk lamp on, twice", called, done, failed)
    assert ask(Home(LAMPS), "desk lamp on, twice", called, failed, done).prompt == in_order.prompt
    assert in_order.prompt.split("\n")[1].endswith("= error: the lamp does not answer")


@pytest.mark.parametrize(
    "answer", ["", '[{"call": "Turn', '{"missing": "light"}', '{"talk": true}', '{"missing": "timer"}']
)
def test_answers_without_calls_are_said(answer: str) -> None:
    reply = ask(Home(LAMPS), "hm").reply(answer)
    assert reply.text
    assert not reply.calls


DONE = {"response_type": "action_done", "data": {"success": [{"name": "Desk Lamp", "type": "entity"}], "failed": []}}
FAILED = {"error": "HomeAssistantError", "error_text": "the lamp does not answer"}
STATES = {
    "success": True,
    "result": "Live Context:\n- names: Desk Lamp\n  domain: light\n  state: 'on'\n  areas: Study\n",
}


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (DONE, "= done: Desk Lamp"),
        (FAILED, "= error: the lamp does not answer"),
        (STATES, "= light Desk Lamp (Study): on"),
        ({"success": True, "result": {"time": "10:20"}}, "= time 10:20"),
    ],
)
def test_results_are_read_as_older_and_newer_versions_of_home_assistant_send_them(
    result: dict[str, Any], said: str
) -> None:
    called = {"role": "assistant", "tool_calls": CALLS}
    for sent in (result, {"data": result, "error": "error" in result}):
        request = ask(Home(LAMPS), "is the desk lamp on", called, {"role": "tool", "content": json.dumps(sent)})
        assert request.adapter == "reply"
        assert said in request.prompt.split("\n")[0]


def test_without_tools_the_answer_names_the_setting_to_change() -> None:
    request = rewrite([{"role": "user", "content": "what time is it"}])
    assert request.prompt == "> what time is it"
    reply = request.reply('[{"call": "GetDateTime"}]')
    assert not reply.calls
    assert "Control Home Assistant" in reply.text


def test_rows_of_replies_are_short_sentences_about_their_results() -> None:
    for row in islice(replies.rows("replies", None, 0, training=True), 200):
        assert " = " in row["prompt"]
        assert row["completion"][0].isupper() or not row["completion"][0].isalpha()
        assert row["completion"].endswith(".")
        assert "{" not in row["completion"]


def test_numbers_are_said_in_words() -> None:
    assert [in_words(number) for number in (0, 15, 40, 73, 100, 2700)] == [
        "zero", "fifteen", "forty", "seventy three", "one hundred", "2700",
    ]  # fmt: skip


def test_tasks_with_one_prompt_get_calls_with_the_arguments_of_their_own_tools() -> None:
    reply_to = runpy.run_path(str(EXAMPLE / "score.py"))["answer"]
    request = ask(Home(LAMPS), "desk lamp on")
    answered = '[{"call": "TurnOn", "domain": "light", "name": "Desk Lamp"}]'
    answers = {json.dumps([request.prompt, request.schema]): answered}
    for listed in ({"name"}, {"name", "domain"}):
        parameters = {"properties": {key: {} for key in listed}}
        tools = [{**tool["function"], "parameters": parameters} for tool in ALL_TOOLS]
        task = {"text": "desk lamp on", "system": system_of(Home(LAMPS)), "tools": tools}
        # Nothing is computed, as the answer to this prompt is known.
        (call,) = reply_to(None, "calls", task, answers, []).calls
        assert call["arguments"].keys() == listed


def test_a_bundle_from_generated_rows_answers_tasks(
    tiny_gguf: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [
        {"task_id": text, "category": "light", "text": text, "system": system_of(Home(LAMPS)), "tools": ALL_TOOLS}
        for text in ("desk lamp on", "is the front door locked")
    ]
    write_rows(tmp_path / "tasks.jsonl", tasks)
    monkeypatch.chdir(tmp_path)
    run("generate.py", "--rows", "24", "--exclude", "tasks.jsonl", "--out", "rows", monkeypatch=monkeypatch)
    quick = [
        "training.max_steps=2",
        "training.evals=1",
        "training.precision=fp32",
        "threads=1",
        f"base={tiny_gguf('llama')}",
    ]
    options = [word for setting in quick for word in ("--set", setting)]
    assert edgetune(["build", "rows/recipe.yaml", "--out", "bundle", *options]) == 0
    run("score.py", "bundle", "tasks.jsonl", "--out", "predictions.jsonl", monkeypatch=monkeypatch)
    predictions = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [prediction["task_id"] for prediction in predictions] == [task["task_id"] for task in tasks]
    offered_names = {tool.name for tool in TOOLS.values()}
    assert all(call["name"] in offered_names for prediction in predictions for call in prediction["calls"])
    assert "2 different prompts" in capsys.readouterr().out
    with Runtime.open("bundle") as runtime:
        request = ask(Home(LAMPS), "lamp on")
        answer = runtime.generate(request.prompt, adapter=request.adapter, schema=request.schema, max_tokens=200)
        assert request.reply(answer.text)
    rewriters = [Rewriter.load("assist=assist.prompt:rewrite", EXAMPLE)]
    with started(Path("bundle"), rewriters=rewriters, contexts=1) as server:
        asyncio.run(_converse(server.url))


async def _converse(url: str) -> None:
    async with ollama.AsyncClient(host=url) as client:
        await _converse_with(client)


async def _converse_with(client: ollama.AsyncClient) -> None:
    """Two requests as Home Assistant's integration of Ollama makes them: a sentence, then the results of calls."""
    models = {model["model"] for model in (await client.list()).get("models", [])}
    assert "assist:latest" in models
    said = [{"role": "system", "content": system_of(Home(LAMPS))}, {"role": "user", "content": "lamp on"}]
    done = [
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": json.dumps({"data": DONE, "error": False})},
    ]
    for messages, is_last in ((said, False), ([*said, *done], True)):
        generator = await client.chat(
            model="assist:latest",
            messages=messages,
            tools=ALL_TOOLS,
            stream=True,
            keep_alive=-1,
            options={"num_ctx": 8192},
            think=False,
        )
        parts = [part async for part in generator]
        calls = [call.function.name for part in parts for call in part.message.tool_calls or []]
        text = "".join(part.message.content or "" for part in parts)
        assert parts[-1].done
        assert bool(text) != bool(calls)
        assert not (is_last and calls)
        assert set(calls) <= {tool.name for tool in TOOLS.values()}


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script of the example in this process; exit code 0."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(EXAMPLE / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
