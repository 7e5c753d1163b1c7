from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from edgetune_runtime.inference.generation import _Answering
from edgetune_runtime.inference.measuring import loaded_bundle
from openai import OpenAI
from pydantic import BaseModel, ConfigDict
from runtime.server.conftest import Running, Start
from runtime.server.test_limits import LONG
from waiting import wait_for

PROMPT = "turn on the light"
LAMP: dict[str, Any] = {
    "type": "object",
    "properties": {"area": {"enum": ["hall", "kitchen"]}},
    "required": ["area"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "name": "lamp", "description": "Switch a lamp", "parameters": LAMP, "strict": True},
    {"type": "function", "name": "clock", "description": "Tell the time", "parameters": None, "strict": None},
]
CHAT_TOOLS = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
HOT: dict[str, Any] = {"temperature": 1.5, "max_output_tokens": 200, "extra_body": {"seed": 1}}


class Color(BaseModel):
    model_config = ConfigDict(extra="forbid")
    color: Literal["red", "warm"]


@pytest.fixture
def tools_client(start: Start, tools_bundle: Path) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{start(tools_bundle, contexts=1).url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_a_text_is_answered_as_in_chat(server: Running, client: OpenAI) -> None:
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=12)
    neutral = {"n": 1, "frequency_penalty": 0, "logit_bias": {}}
    reply = client.responses.create(model="command", input=PROMPT, max_output_tokens=12, extra_body=neutral)
    assert (reply.output_text, reply.model) == (expected.text, "command")
    assert (reply.status, reply.incomplete_details and reply.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert reply.usage is not None
    assert reply.usage.input_tokens == expected.timings.prompt_tokens
    assert (reply.usage.output_tokens, reply.usage.total_tokens) == (12, 12 + expected.timings.prompt_tokens)


def test_encrypted_reasoning_may_be_asked_for_in_vain(client: OpenAI) -> None:
    reply = client.responses.create(
        model="command", input=PROMPT, max_output_tokens=4, include=["reasoning.encrypted_content"]
    )
    assert [item.type for item in reply.output] == ["message"]


def test_messages_and_instructions_make_a_conversation(server: Running, client: OpenAI) -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "light"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "on"}]},
        {"role": "user", "content": "off"},
    ]
    messages = [
        {"role": "system", "content": "play"},
        {"role": "user", "content": "light"},
        {"role": "assistant", "content": "on"},
        {"role": "user", "content": "off"},
    ]
    expected = server.runtime.generate(messages, adapter="tone", max_tokens=8)
    reply = client.responses.create(model="tone", input=items, instructions="play", max_output_tokens=8)
    assert reply.output_text == expected.text
    assert (reply.instructions, reply.store) == ("play", False)  # type: ignore[attr-defined]
    # What a response says can be sent back as it is.
    again: list[Any] = [*items, *[item.to_dict() for item in reply.output], {"role": "user", "content": "on"}]
    assert client.responses.create(model="tone", input=again, instructions="play", max_output_tokens=2).output_text


def test_the_events_of_a_stream_make_the_whole_response(server: Running, client: OpenAI) -> None:
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=12).text
    events = list(client.responses.create(model="command", input=PROMPT, max_output_tokens=12, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    pieces = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * pieces,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert pieces > 5
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected
    with client.responses.stream(model="command", input=PROMPT, max_output_tokens=12) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert texts[-1] == expected


def test_a_response_fits_a_schema_and_is_parsed(client: OpenAI) -> None:
    parsed = client.responses.parse(model="command", input=PROMPT, text_format=Color, **HOT)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.color in ("red", "warm")
    assert parsed.status == "completed"
    with client.responses.stream(model="command", input=PROMPT, text_format=Color, **HOT) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    whole = client.responses.create(model="home", input=PROMPT, text={"format": {"type": "json_object"}}, **HOT)
    assert whole.output_text.startswith("{")


def test_a_call_and_its_result_make_a_round_trip(tools_client: OpenAI) -> None:
    choice: Any = {"type": "function", "name": "lamp"}
    first = tools_client.responses.create(model="one", input="light", tools=TOOLS, tool_choice=choice, **HOT)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, first.output_text, first.status) == ("lamp", "", "completed")
    assert json.loads(call.arguments)["area"] in ("hall", "kitchen")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    items: list[Any] = [{"role": "user", "content": "light"}, call.to_dict(), result]
    second = tools_client.responses.create(
        model="one", input=items, tools=TOOLS, tool_choice="none", max_output_tokens=8
    )
    chat = tools_client.chat.completions.create(
        model="one",
        messages=[
            {"role": "user", "content": "light"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
        ],
        tools=CHAT_TOOLS,  # type: ignore[arg-type]
        tool_choice="none",
        max_tokens=8,
    )
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None and chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens


def test_streamed_calls_are_those_of_the_whole_response(tools_client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "one", "input": "light", "tools": TOOLS, "tool_choice": "required", **HOT}
    whole = tools_client.responses.create(**arguments)
    wanted = [(item.name, item.arguments) for item in whole.output if item.type == "function_call"]
    assert wanted
    with tools_client.responses.stream(**arguments) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert [event.arguments for event in done] == [text for _, text in wanted]
    assert [(item.name, item.arguments) for item in final.output if item.type == "function_call"] == wanted
    one = tools_client.responses.create(**arguments, parallel_tool_calls=False)
    assert [item.name for item in one.output if item.type == "function_call"] == [wanted[0][0]]


@pytest.mark.parametrize(("before", "kinds"), [("\n", ["function_call"]), ("on\n\n", ["message", "function_call"])])
def test_whitespace_before_a_call_is_in_no_item(
    before: str, kinds: list[str], start: Start, tools_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(tools_bundle, contexts=1)
    tokenizer = loaded_bundle(server.runtime).context()[0].engine.tokenizer
    written = f'{before}<tool_call>\n{{"name": "lamp", "arguments": {{"area": "hall"}}}}\n</tool_call>'
    tokens = [*tokenizer.tokenize(written, continues=True), tokenizer.end_token]

    def chosen(answering: _Answering, _row: object, computed: int) -> int:
        return tokens[computed - len(answering._call.job.tokens)]

    monkeypatch.setattr(_Answering, "_chosen", chosen)
    arguments: dict[str, Any] = {"model": "one", "input": "light", "tools": TOOLS, "max_output_tokens": 200}
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        whole = client.responses.create(**arguments)
        with client.responses.stream(**arguments) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
    assert [item.type for item in final.output] == [item.type for item in whole.output] == kinds
    assert "".join(deltas) == final.output_text == whole.output_text == before.rstrip()


def test_a_client_that_leaves_frees_the_context(start: Start) -> None:
    server = start(**LONG)
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
        client.responses.create(model="command", input=PROMPT, max_output_tokens=490, stream=True) as stream,
    ):
        assert any(event.type == "response.output_text.delta" for event in stream)
    wait_for(lambda: server.is_idle)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": []}, "input is"),
        ({"input": 3}, "input is 3; give a list of JSON objects"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\].type is"),
        ({"input": [{"role": "king", "content": "x"}]}, r"input\[0\].role is"),
        ({"input": [{"role": "assistant", "tool_calls": "x"}]}, r"input\[0\].tool_calls is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, r"input\[0\].content\[0\].type is"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, r"input\[0\].call_id is missing"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": 5}]}, r"input\[0\].output is 5"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}]},
            r"input\[0\].output\[0\].type is",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"background": True}, "background is not supported"),
        ({"include": ["message.output_text.logprobs"]}, r"include is \[.*\]; give none"),
        ({"extra_body": {"frequency_penalty": 1.0}}, "frequency_penalty is not supported"),
        ({"extra_body": {"presence_penalty": 1.0}}, "presence_penalty is not supported"),
        ({"extra_body": {"logit_bias": {"5": 10}}}, "logit_bias is not supported"),
        ({"extra_body": {"n": 3}}, "n is not supported"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type is"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.name is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type is"),
        ({"max_output_tokens": "many"}, "max_output_tokens is"),
        ({"input": "light " * 400}, "the context allows"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_an_invalid_request_is_a_one_line_error(
    streams: bool, more: dict[str, Any], message: str, client: OpenAI
) -> None:
    arguments: dict[str, Any] = {"model": "command", "input": PROMPT, "stream": streams, **more}
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**arguments)


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="comand"):
        client.responses.create(model="comand", input=PROMPT)
