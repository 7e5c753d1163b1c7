from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from edgetune_runtime.text.chat import messages_for
from edgetune_runtime.text.controls import ControlTokens
from edgetune_runtime.tools.calls import CallReader
from edgetune_runtime.tools.definitions import tool_set
from edgetune_runtime.tools.formats import HERMES, template_tools
from edgetune_runtime.tools.prompts import prompt_text
from runtime.tools.templates import FAMILIES
from tiny import CHAT_TEMPLATE

CALLS = [
    {"name": "set_light", "arguments": {"area": "hall", "on": [True, None]}, "id": "call00001"},
    {"name": "get_time", "arguments": {}, "id": "call00002"},
]
FIRST, SECOND = '{"area": "hall", "on": [true, null]}', "{}"
ESCAPED = "{area:<escape>hall<escape>,on:[true,null]}"
QUOTED = ESCAPED.replace("<escape>", '<|"|>')
WRITTEN = {
    "qwen": f'<tool_call>\n{{"name": "set_light", "arguments": {FIRST}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "get_time", "arguments": {SECOND}}}\n</tool_call>',
    "mistral": f'[TOOL_CALLS][{{"name": "set_light", "arguments": {FIRST}, "id": "call00001"}}, '
    f'{{"name": "get_time", "arguments": {SECOND}, "id": "call00002"}}]',
    "mistral-named": f"[TOOL_CALLS]set_light[ARGS]{FIRST}[TOOL_CALLS]get_time[ARGS]{SECOND}",
    "granite": f'<|tool_call|>[{{"name": "set_light", "arguments": {FIRST}}}, '
    f'{{"name": "get_time", "arguments": {SECOND}}}]',
    "phi4": f'<|tool_call|>{{"name": "set_light", "arguments": {FIRST}}}<|/tool_call|>'
    f'<|tool_call|>{{"name": "get_time", "arguments": {SECOND}}}<|/tool_call|>',
    "llama3": f'{{"name": "set_light", "parameters": {FIRST}}}',
    "function-gemma": f"<start_function_call>call:set_light{ESCAPED}<end_function_call>"
    "<start_function_call>call:get_time{}<end_function_call><start_function_response>",
    "gemma4": f"<|tool_call>call:set_light{QUOTED}<tool_call|>"
    "<|tool_call>call:get_time{}<tool_call|><|tool_response>",
}
HERMES_FAMILIES = ("smollm3", "gemma3", "not-json")
TOOLS = tool_set([{"name": "set_light", "description": "Switch", "parameters": {}}, {"name": "get_time"}])
TALK = messages_for(
    [
        {"role": "user", "content": "light"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALLS[0]}]},
        {"role": "tool", "content": '"done"'},
    ],
    "Be brief.",
)


@dataclass
class Template:
    """What rendering asks of a tokenizer."""

    chat_template: str | None
    bos: str = "<s>"
    eos: str = "</s>"
    controls: ControlTokens = field(default_factory=lambda: ControlTokens(()))


@pytest.mark.parametrize("family", WRITTEN)
def test_the_format_is_that_of_the_template(family: str) -> None:
    found = template_tools(FAMILIES[family], "<s>", "</s>")
    calls = CALLS[:1] if family == "llama3" else CALLS
    assert found.renders_tools
    assert found.format.write(calls) == WRITTEN[family]


@pytest.mark.parametrize("family", HERMES_FAMILIES)
def test_a_template_without_a_known_format_gets_that_of_hermes(family: str) -> None:
    assert template_tools(FAMILIES[family], "<s>", "</s>").format == HERMES


@pytest.mark.parametrize("family", FAMILIES)
def test_no_template_drops_tools_or_calls_or_results(family: str) -> None:
    text = prompt_text(Template(FAMILIES[family]), TALK, TOOLS)  # type: ignore[arg-type]
    first = {"function-gemma": ESCAPED, "gemma4": QUOTED}.get(family, FIRST)
    for said in ("Switch", "get_time", "light", first, "done"):
        assert said in text
    assert text.index("Switch") < text.rindex(first) < text.rindex("done")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, FAMILIES["gemma3"], None])
def test_what_a_template_ignores_is_put_into_the_texts(template: str | None) -> None:
    two = messages_for([*TALK[:-1], *[{"role": "tool", "content": text} for text in ("done", "well")]], None)
    text = prompt_text(Template(template), two, TOOLS)  # type: ignore[arg-type]
    definitions = [json.dumps(definition) for definition in TOOLS.definitions] if TOOLS else []
    assert "Be brief.\n\n# Tools\n" in text
    assert "<tools>\n" + "\n".join(definitions) + "\n</tools>" in text
    assert f'<tool_call>\n{{"name": "set_light", "arguments": {FIRST}}}\n</tool_call>' in text
    # In one message, because users and assistants alternate.
    assert "<tool_response>\ndone\n</tool_response>\n<tool_response>\nwell\n</tool_response>" in text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, FAMILIES["gemma3"], None])
def test_the_next_request_is_in_the_message_of_results(template: str | None) -> None:
    talk = messages_for([*TALK, {"role": "user", "content": "and the hall"}], None)
    text = prompt_text(Template(template), talk, TOOLS)  # type: ignore[arg-type]
    assert '<tool_response>\n"done"\n</tool_response>\nand the hall' in text


@pytest.mark.parametrize("family", WRITTEN)
def test_calls_are_read_as_they_were_written(family: str) -> None:
    reader = CallReader(template_tools(FAMILIES[family], "<s>", "</s>").format)
    wanted = CALLS[:1] if family == "llama3" else CALLS
    before = "" if family == "llama3" else "One moment. "
    content, calls = reader.read(f"{before}{WRITTEN[family]}")
    assert content == before.strip()
    assert [(call.name, call.arguments) for call in calls] == [(call["name"], call["arguments"]) for call in wanted]
    assert all(len(call.id) == 9 for call in calls)
    if family == "mistral":
        assert [call.id for call in calls] == ["call00001", "call00002"]


@pytest.mark.parametrize("family", WRITTEN)
def test_a_call_that_is_cut_off_is_left_out(family: str) -> None:
    reader = CallReader(template_tools(FAMILIES[family], "<s>", "</s>").format)
    text = WRITTEN[family]
    for length in range(len(text)):
        _, calls = reader.read(text[:length])
        assert len(calls) <= text[:length].count("set_light") + text[:length].count("get_time")
        for call, wanted in zip(calls, CALLS, strict=False):
            assert (call.name, call.arguments) == (wanted["name"], wanted["arguments"])
    assert reader.read("Just text with { and [.") == ("Just text with { and [.", ())


@pytest.mark.parametrize("family", ["qwen", "mistral", "llama3"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_stream_shows_the_text_before_the_calls(family: str, size: int) -> None:
    form = template_tools(FAMILIES[family], "<s>", "</s>").format

    def shown(text: str, *, is_cut_off: bool = False) -> str:
        stream = CallReader(form).stream()
        pieces = [stream.push(text[at : at + size]) for at in range(0, len(text), size)]
        return "".join([*pieces, stream.finish(is_cut_off=is_cut_off)])

    texts = ["é < [TOOL <tool_", "One\n\ntwo \n", " \n", "", WRITTEN[family]]
    if form.marker:
        calls = WRITTEN[family]
        texts += [f"Well: {calls} more", f"\n{calls}", f"One \n two\n\n{calls}", f"Well \n {form.marker}"]
        texts += [f"Well \n {form.marker[:3]}"]
    for text in texts:
        for is_cut_off in (False, True):
            assert shown(text, is_cut_off=is_cut_off) == CallReader(form).read(text, is_cut_off=is_cut_off)[0]
    assert shown(texts[1]) == texts[1]
    if form.marker:
        assert (shown(texts[-1]), shown(texts[-1], is_cut_off=True)) == (texts[-1], "Well")


def test_an_answer_that_is_cut_off_keeps_its_end_where_a_marker_is_one_token() -> None:
    form, text = template_tools(FAMILIES["qwen"], "<s>", "</s>").format, "Well, 1 <"
    reader = CallReader(form, is_one_token=True)
    stream = reader.stream()
    assert reader.read(text, is_cut_off=True) == (text, ())
    assert stream.push(text) + stream.finish(is_cut_off=True) == text
