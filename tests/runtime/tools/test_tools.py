from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from edgetune_runtime import Runtime, ToolCall, UsageError, cli
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.options import split_options
from edgetune_runtime.tools.calls import CallReader
from edgetune_runtime.tools.formats import HERMES, CallFormat, Placeholder
from jsonschema import validate
from runtime.bundles import change_manifest
from runtime.tools.templates import CONTROLS, FAMILIES
from tiny import CHAT_TEMPLATE

LIGHT = {
    "type": "object",
    "properties": {"area": {"enum": ["hall", "kitchen"]}, "level": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["area"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "set_light", "description": "Set the light", "parameters": LIGHT}},
    {"name": "set_light_off", "parameters": {"properties": {"areas": {"type": "array", "items": {"type": "boolean"}}}}},
    {"name": "get_time"},
]
SCHEMAS: dict[str, dict[str, Any]] = {
    "set_light": LIGHT,
    "set_light_off": {"type": "object", "additionalProperties": False, **TOOLS[1]["parameters"]},
    "get_time": {"type": "object", "maxProperties": 0},
}
AREA = {
    "type": "object",
    "properties": {"area": {"type": "string", "maxLength": 12}},
    "required": ["area"],
    "additionalProperties": False,
}
LLAMA3_FORM = CallFormat('{"name": "', (Placeholder.NAME, '", "parameters": ', Placeholder.ARGUMENTS), None, "}")
HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 200}
TEMPLATES = {**FAMILIES, "plain": CHAT_TEMPLATE}
# Both engines have the same tokens, and nothing but tokens reaches a constraint: the other engine has one family whose
# mark is a control token, one whose mark is text, and one without.
each_family = pytest.mark.parametrize(
    ("opened", "family"),
    [*(("gguf", family) for family in TEMPLATES), *(("onnx", family) for family in ("mistral", "qwen", "llama3"))],
    indirect=["opened"],
)


def fits(call: ToolCall) -> bool:
    validate(call.arguments, SCHEMAS[call.name])
    return len(call.id) == 9


@each_family
def test_required_calls_always_parse_and_fit_their_schemas(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    for seed in range(6):
        answer = runtime.generate("light", tools=TOOLS, tool_choice="required", seed=seed, **HOT)
        assert answer.content == ""
        assert all(map(fits, answer.tool_calls))
        assert answer.tool_calls or answer.stop_reason == "length"
        if answer.stop_reason == "end":
            assert len(re.findall("set_light|get_time", answer.text)) == len(answer.tool_calls) > 0
            # Each takes up to 200 steps.
            break
    else:
        pytest.fail("no answer ended")


@each_family
def test_a_named_tool_is_called_once(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    for name in SCHEMAS:
        answer = runtime.generate("light", tools=TOOLS, tool_choice=name, seed=1, **HOT)
        assert [call.name for call in answer.tool_calls] == [name]
        assert answer.stop_reason == "end"
        assert fits(answer.tool_calls[0])


@each_family
def test_a_call_that_the_model_begins_is_held_to_the_end(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    loaded = loaded_bundle(runtime)
    written = runtime.generate("light", tools=TOOLS, tool_choice="set_light", seed=1, **HOT).text
    tokenizer = loaded.context()[0].engine.tokenizer
    form = loaded.call("light", None, form=auto())
    assert form.constraint is not None
    before = "" if family == "llama3" else "well < [\n"
    tokens = tokenizer.tokenize(before, continues=True) + tokens_of(written, tokenizer)
    assert form.constraint.valid_prefix(tokens) == len(tokens)
    form.constraint.accept(*tokens)
    assert form.constraint.may_end
    other = tokenizer.tokenize(before, continues=True) + tokens_of(written.replace("light", "heat"), tokenizer)
    assert loaded.call("light", None, form=auto()).constraint.valid_prefix(other) < len(other)  # type: ignore[union-attr]


def tokens_of(written: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a call's text, whose control tokens are followed by a space that the tokenizer adds by itself."""
    names = "|".join(map(re.escape, CONTROLS))
    return tokenizer.tokenize(re.sub(f"({names}) ", r"\1", written), continues=True)


def auto(choice: str = "auto") -> Any:  # noqa: ANN401 - of a private module
    return split_options({"tools": TOOLS, "tool_choice": choice})[1]


@each_family
def test_no_call_begins_where_none_may(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    written = runtime.generate("light", tools=TOOLS, tool_choice="get_time", **HOT).text
    constraint = loaded_bundle(runtime).call("light", None, form=auto("none")).constraint
    assert constraint is not None
    tokens = tokens_of(written, loaded_bundle(runtime).context()[0].engine.tokenizer)
    assert constraint.valid_prefix(tokens) < len(tokens)
    assert runtime.generate("light", tools=TOOLS, tool_choice="none", max_tokens=5).tool_calls == ()


def test_a_control_token_spelled_in_letters_is_refused(templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES["granite"])
    tokenizer = loaded_bundle(runtime).context()[0].engine.tokenizer
    constraint = loaded_bundle(runtime).call("light", None, form=auto()).constraint
    letters = [token for letter in "<|tool_call|>" for token in tokenizer.tokenize(letter, continues=True)[-1:]]
    assert constraint is not None
    assert constraint.valid_prefix(letters) == len(letters) - 1


def test_text_is_the_same_as_without_the_constraint_where_no_call_begins(opened: Runtime) -> None:
    free = opened.generate("light", tools=TOOLS, max_tokens=20)
    none = opened.generate("light", tools=TOOLS, tool_choice="none", max_tokens=20)
    assert free.text == none.text == free.content
    assert free.tool_calls == ()


def test_a_stream_has_no_calls_in_it(templated: Callable[[str], Runtime]) -> None:
    for family in ("mistral", "qwen", "llama3"):
        stream = templated(TEMPLATES[family]).stream("light", tools=TOOLS, tool_choice="get_time")
        assert list(stream) == []
        assert stream.answer is not None
        assert stream.answer.tool_calls[0].name == "get_time"


def test_a_call_has_the_same_text_with_log_probabilities(templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES["mistral"])
    plain, told = (runtime.generate("light", tools=TOOLS, tool_choice="get_time", logprobs=n) for n in (None, 1))
    assert told.text[:-14] == plain.text[:-14]
    assert told.logprobs is not None
    assert len(told.logprobs) == told.tokens
    assert told.tool_calls[0].name == "get_time"


def test_a_call_that_is_cut_off_is_no_call_and_no_error(opened: Runtime) -> None:
    answer = opened.generate("light", tools=TOOLS, tool_choice="set_light", max_tokens=12)
    assert answer.stop_reason == "length"
    assert (answer.tool_calls, answer.content) == ((), "")
    assert answer.text.startswith("<tool_call>")
    for more in ({}, {"schema": AREA}):
        stream = opened.stream("light", tools=TOOLS, tool_choice="set_light", max_tokens=4, **more)
        shown = "".join(stream)
        assert stream.answer is not None
        assert (stream.answer.text, stream.answer.content, shown) == ("<too", "", "")


@each_family
def test_a_session_continues_after_the_result_of_a_tool_call(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    with runtime.session("one") as session:
        answer = session.send("light", tools=TOOLS, tool_choice="set_light", **HOT)
        (call,) = answer.tool_calls
        assert session.history[-1] == answer.message
        assert answer.message["tool_calls"][0]["function"] == {"name": "set_light", "arguments": call.arguments}
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        told = session.send([result], tools=TOOLS, max_tokens=4)
        assert told.timings.prompt_tokens > answer.timings.prompt_tokens
        assert [message["role"] for message in session.history] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("family", ["plain", "qwen", "granite"])
def test_a_session_reuses_the_call_that_it_made(family: str, templated: Callable[[str], Runtime]) -> None:
    with templated(TEMPLATES[family]).session("one") as session:
        first = session.send("light", tools=TOOLS, tool_choice="get_time")
        result = {"role": "tool", "content": "noon"}
        second = session.send([result], tools=TOOLS, max_tokens=4)
    # Forced tokens at the end of an answer are not computed.
    assert second.timings.reused_tokens >= first.timings.prompt_tokens


def test_a_text_is_nothing_to_do_where_a_call_was_expected_and_a_value_after_its_result(opened: Runtime) -> None:
    call = {"type": "function", "function": {"name": "get_time", "arguments": {}}}
    asked: list[dict[str, Any]] = [{"role": "user", "content": "light"}]
    answered = [*asked, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    for prompt, kind in ((asked, "nothing"), (answered, "value")):
        text = opened.generate(prompt, tools=TOOLS, **{**HOT, "max_tokens": 12}, seed=0).text
        answer = opened.generate(prompt, tools=TOOLS, **HOT, seed=0, stop=text[-3:])
        assert answer.text.strip()
        assert answer.kind == kind


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
@pytest.mark.parametrize("as_session", [False, True])
def test_the_state_of_system_prompt_and_tools_is_found_again(
    engine: str, as_session: bool, tools_bundle: Path, tmp_path: Path
) -> None:
    def ask(runtime: Runtime, text: str, tools: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - an answer
        if as_session:
            with runtime.session("one") as session:
                return session.send(text, tools=tools, max_tokens=3)
        return runtime.generate(text, adapter="one", tools=tools, max_tokens=3)

    folder = tmp_path / "states"
    with Runtime.open(tools_bundle, engine=engine, cache_folder=folder) as first:
        fixed = loaded_bundle(first).call("?", "one", form=auto()).job.fixed
        plain = loaded_bundle(first).call("?", "one").job.fixed
        assert fixed > plain + 100
        cold = ask(first, "light", TOOLS)
        assert ask(first, "play", TOOLS).timings.reused_tokens >= fixed
    with Runtime.open(tools_bundle, engine=engine, cache_folder=folder) as again:
        warm = ask(again, "light", TOOLS)
        assert (cold.timings.reused_tokens, warm.timings.reused_tokens) == (0, fixed)
        assert warm.text == cold.text
        assert ask(again, "light", TOOLS[:1]).timings.reused_tokens < fixed
        assert again.warm(["one"], tools=TOOLS) == {"one": fixed}


def test_tools_replace_the_adapters_own_constraint(tools_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tools_bundle, tmp_path / "home"))
    change_manifest(bundle, lambda raw: raw["adapters"]["one"].update(output={"choices": ["red"]}))
    with Runtime.open(bundle, disk_mb=0) as runtime:
        assert runtime.generate("light", adapter="one").text == "red"
        assert runtime.generate("light", adapter="one", tools=[]).text == "red"
        answer = runtime.generate("light", adapter="one", tools=TOOLS, tool_choice="get_time")
        assert [call.name for call in answer.tool_calls] == ["get_time"]
        assert runtime.generate("light", adapter="one", tools=TOOLS, tool_choice="none", max_tokens=4).text != "red"


@each_family
def test_with_a_schema_an_answer_is_either_calls_or_json_that_fits(
    family: str, templated: Callable[[str], Runtime]
) -> None:
    runtime = templated(TEMPLATES[family])
    options = {"tools": TOOLS, "schema": AREA}
    for seed in range(12):
        stream = runtime.stream("light", seed=seed, **options, **HOT)
        shown, answer = "".join(stream), stream.answer
        assert answer is not None
        if answer.stop_reason != "end":
            continue
        assert shown == answer.content
        if answer.tool_calls:
            assert all(map(fits, answer.tool_calls))
            assert (answer.content, answer.parsed) == ("", None)
        else:
            assert answer.content == answer.text
            validate(answer.parsed, AREA)
            break
    else:
        pytest.fail("no answer was JSON")
    for choice, is_call in (("required", True), ("set_light", True), ("none", False)):
        answer = runtime.generate("light", seed=1, tool_choice=choice, **options, **HOT)
        assert (answer.stop_reason, bool(answer.tool_calls)) == ("end", is_call)
        assert all(map(fits, answer.tool_calls))
        assert not is_call or (answer.content, answer.parsed) == ("", None)


def test_texts_of_the_prompt_hold_beside_tools_that_may_not_be_called(opened: Runtime) -> None:
    text = {"type": "string", "x-from-prompt": True}
    form = {"type": "object", "properties": {"name": text}, "required": ["name"], "additionalProperties": False}
    for seed in range(5):
        answer = opened.generate("light on", tools=TOOLS, tool_choice="none", schema=form, seed=seed, **HOT)
        assert answer.parsed["name"] in {"light", "on", "light on"}


@each_family
def test_with_a_schema_both_forms_can_begin_and_nothing_else(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    tokenizer = loaded_bundle(runtime).context()[0].engine.tokenizer
    _, form, _ = split_options({"tools": TOOLS, "schema": AREA})
    written = runtime.generate("light", tools=TOOLS, tool_choice="set_light", seed=1, **HOT).text
    for text, is_allowed in (
        (written, True),
        ('{"area": "<tool_call>"}', True),
        ("hall", False),
        ("x" + written, False),
    ):
        constraint = loaded_bundle(runtime).call("light", None, form=form).constraint
        assert constraint is not None
        tokens = tokens_of(text, tokenizer)
        assert (constraint.valid_prefix(tokens) == len(tokens)) is is_allowed, text


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_schemas_with_references_can_be_combined(family: str, templated: Callable[[str], Runtime]) -> None:
    runtime = templated(TEMPLATES[family])
    rooms = {"$defs": {"room": {"enum": ["hall", "attic"]}}, "type": "object", "required": ["room"]}
    schema = {**rooms, "properties": {"room": {"$ref": "#/$defs/room"}}, "additionalProperties": False}
    tools = [{"name": "lamp", "parameters": schema}]
    for choice in ("required", "auto"):
        answer = runtime.generate("light", tools=tools, tool_choice=choice, schema=schema, seed=1, **HOT)
        found = answer.tool_calls[0].arguments if answer.tool_calls else answer.parsed
        assert found["room"] in {"hall", "attic"}
    _, form, _ = split_options({"tools": tools, "schema": schema})
    tokenizer = loaded_bundle(runtime).context()[0].engine.tokenizer
    written = runtime.generate("light", tools=tools, tool_choice="lamp", seed=1, **HOT).text
    constraint = loaded_bundle(runtime).call("light", None, form=form).constraint
    assert constraint is not None
    tokens = tokens_of(written, tokenizer)
    assert constraint.valid_prefix(tokens) == len(tokens)


def test_json_with_the_mark_of_calls_in_it_is_no_call() -> None:
    reader = CallReader(HERMES, names=frozenset(SCHEMAS))
    for text in ('{"area": "<tool_call>"}', '[{"a": 1}]', ""):
        assert reader.read(text) == reader.read(text, is_cut_off=True) == (text, ())
        assert shown(reader, text) == text
    assert shown(reader, '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>') == ""
    # Without marks, an object is a call only if it names a tool.
    reader = CallReader(LLAMA3_FORM, names=frozenset(SCHEMAS))
    other = '{"name": "Anna", "parameters": {}}'
    assert (reader.read(other), shown(reader, other)) == ((other, ()), other)
    called = other.replace("Anna", "get_time")
    assert ([call.name for call in reader.read(called)[1]], shown(reader, called)) == (["get_time"], "")


@pytest.mark.parametrize("number", ["1e999", "9" * 5000, "NaN", "-Infinity"])
def test_a_call_with_a_number_that_json_cannot_have_is_not_read(number: str) -> None:
    escaped = CallFormat("call:", (Placeholder.NAME, Placeholder.ARGUMENTS), None, "", "escaped")
    for form, text in (
        (HERMES, '<tool_call>\n{"name": "heat", "arguments": {"level": NUMBER}}\n</tool_call>'),
        (escaped, "call:heat{level:NUMBER}"),
    ):
        assert CallReader(form).read(text.replace("NUMBER", "20"))[1][0].arguments == {"level": 20}
        assert CallReader(form).read(text.replace("NUMBER", number)) == ("", ())


def shown(reader: CallReader, text: str) -> str:
    stream = reader.stream()
    return "".join(map(stream.push, text)) + stream.finish()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"choices": ["on"]}, "tools and choices are both given; give one of them"),
        ({"unconstrained": True}, "unconstrained and tools are both given; give one of them"),
        ({"tool_choice": "heat"}, "tool_choice is 'heat'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(opened: Runtime, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        opened.generate("light", tools=TOOLS, **options)


def test_a_function_can_be_a_tool(opened: Runtime) -> None:
    def set_heat(degrees: Literal[18, 20]) -> None:
        """Set the heating."""

    answer = opened.generate("heat", tools=[set_heat], tool_choice="set_heat", max_tokens=100)
    assert answer.tool_calls[0].arguments["degrees"] in {18, 20}


def test_the_command_prints_the_calls(tools_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS), encoding="utf-8")
    command = ["generate", str(tools_bundle), "--prompt", "light", "--tools", str(file)]
    assert cli.main([*command, "--tool-choice", "get_time", "--json"]) == 0
    (call,) = json.loads(capsys.readouterr().out)["tool_calls"]
    assert (call["name"], call["arguments"]) == ("get_time", {})
    assert cli.main([*command, "--tool-choice", "get_time"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "get_time"
    assert cli.main([*command, "--tool-choice", "heat"]) == UsageError.exit_code
    file.write_text("{", encoding="utf-8")
    assert cli.main(command) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 2
