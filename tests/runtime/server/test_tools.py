from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
from edgetune_runtime.inference.measuring import loaded_bundle
from openai import OpenAI
from runtime.server.conftest import Running, Start, started
from runtime.tools.templates import FAMILIES

LAMP = {
    "type": "object",
    "properties": {"area": {"enum": ["hall", "kitchen"]}, "level": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["area"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "lamp", "description": "Switch a lamp", "parameters": LAMP}},
    {"type": "function", "function": {"name": "clock", "description": "Tell the time"}},
]
ASK: list[Any] = [{"role": "user", "content": "light"}]
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 1, "max_tokens": 200}


@pytest.fixture(scope="module")
def server(tools_bundle: Path) -> Iterator[Running]:
    with started(tools_bundle, contexts=1) as running:
        yield running


def lamp_choice(name: str) -> Any:  # noqa: ANN401 - one of the client's many types
    return {"type": "function", "function": {"name": name}}


def sent_by_ollama() -> list[Any]:
    """The tools as Ollama's client sends them: it leaves out keywords of their schemas that it does not know."""
    return [ollama.Tool.model_validate(tool).model_dump(exclude_none=True) for tool in TOOLS]


def test_a_call_and_its_result_make_a_round_trip(server: Running, client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="one", messages=ASK, tools=TOOLS, tool_choice=lamp_choice("lamp"), **HOT
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "lamp"
    assert json.loads(call.function.arguments)["area"] in ("hall", "kitchen")
    messages = [*ASK, first.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    second = client.chat.completions.create(
        model="one", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8
    )
    written = [
        *ASK,
        {"role": "assistant", "tool_calls": [call.model_dump()], "content": None},
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    expected = server.runtime.generate(written, adapter="one", tools=TOOLS, tool_choice="none", max_tokens=8)
    assert second.choices[0].message.content == expected.text
    assert second.usage is not None
    assert second.usage.prompt_tokens == expected.timings.prompt_tokens


def test_a_streamed_call_is_the_one_of_the_whole_answer(client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "one", "messages": ASK, "tools": TOOLS, "tool_choice": "required", **HOT}
    whole = client.chat.completions.create(**arguments).choices[0]
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    reason = None
    for chunk in client.chat.completions.create(**arguments, stream=True):
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            names[call.index] = call.function.name or names[call.index]
            texts[call.index] = texts.get(call.index, "") + (call.function.arguments or "")
    assert whole.message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == list(
        zip(names.values(), texts.values(), strict=True)
    )
    assert reason == whole.finish_reason == "tool_calls"


def test_the_clients_own_stream_helper_collects_the_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="one", messages=ASK, tools=TOOLS, tool_choice=lamp_choice("lamp"), **HOT
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "lamp"


def test_one_call_at_most_is_returned_if_the_client_wants_no_more(client: OpenAI) -> None:
    counts = set()
    for seed in range(8):
        hot = {**HOT, "seed": seed}
        many, one = (
            client.chat.completions.create(
                model="one", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel, **hot
            ).choices[0]
            for parallel in (True, False)
        )
        counts.add(len(many.message.tool_calls or []))
        assert [call.function for call in one.message.tool_calls or []] == [
            call.function for call in (many.message.tool_calls or [])[:1]
        ]
    assert max(counts) > 1


def test_an_answer_that_is_cut_off_after_a_call_says_so(server: Running, client: OpenAI) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
    answers = (server.runtime.generate(ASK, adapter="one", **options, **{**HOT, "seed": n}) for n in range(8))
    seed, answer = next((n, answer) for n, answer in enumerate(answers) if len(answer.tool_calls) > 1)
    hot = {**HOT, "seed": seed, "max_tokens": answer.tokens - 20}
    choice = client.chat.completions.create(model="one", messages=ASK, **options, **hot).choices[0]
    assert len(choice.message.tool_calls or []) == len(answer.tool_calls) - 1
    assert choice.finish_reason == "length"


def test_with_a_format_an_answer_is_calls_or_json(server: Running, client: OpenAI) -> None:
    area = {"type": "object", "properties": {"area": {"enum": ["hall", "kitchen"]}}, "required": ["area"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "area", "schema": area}}
    kinds = set()
    for seed in range(6):
        choice = client.chat.completions.create(
            model="one", messages=ASK, tools=TOOLS, response_format=form, **{**HOT, "seed": seed}
        ).choices[0]
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "")["area"] in ("hall", "kitchen")
            assert not choice.message.tool_calls
    assert "stop" in kinds
    # As Home Assistant's AI tasks ask, with a schema and the tools of its API.
    with ollama.Client(server.url) as other:
        options = {"num_predict": 200, "temperature": 1.5, "seed": 1}
        reply = other.chat("one", ASK, tools=TOOLS, format=area, options=options, think=False)
        lines = list(other.chat("one", ASK, tools=TOOLS, format=area, options=options, think=False, stream=True))
    assert "".join(line.message.content or "" for line in lines) == reply.message.content
    assert reply.message.tool_calls or json.loads(reply.message.content or "")["area"] in ("hall", "kitchen")


THINKING = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


def test_think_false_is_for_the_base_and_adapters_answer_as_they_were_trained(start: Start, tools_bundle: Path) -> None:
    server = start(tools_bundle, contexts=1)
    loaded_bundle(server.runtime).context()[0].engine.tokenizer.chat_template = THINKING

    def prompt_tokens(model: str, **more: Any) -> int | None:  # noqa: ANN401 - of the client
        with ollama.Client(server.url) as other:
            return other.chat(model, ASK, options={"num_predict": 2}, **more).prompt_eval_count

    plain = prompt_tokens("home")
    assert plain is not None
    silent = prompt_tokens("home", think=False)
    assert silent is not None
    assert silent > plain
    assert prompt_tokens("one", think=False) == prompt_tokens("one")
    own = [server.runtime.generate("light", adapter="one", max_tokens=1, think=think) for think in (None, False)]
    assert own[0].timings.prompt_tokens == own[1].timings.prompt_tokens
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as openais:
        chat = openais.chat.completions.create(model="home", messages=ASK, max_tokens=2, reasoning_effort="none")
        reply = openais.responses.create(model="home", input="light", max_output_tokens=2, reasoning={"effort": "none"})
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == silent
    assert reply.usage is not None
    assert reply.usage.input_tokens == silent


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tool_choice": lamp_choice("door")}, "tool_choice is 'door'"),
        ({"tool_choice": "sometimes"}, 'tool_choice is "sometimes"; give one of auto, none, required'),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice is"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function"}]}, "tool 1 has no name"),
        ({"tools": ["lamp"]}, "tools is"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tool 'lamp' is given twice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "without a function's name"),
        ({"functions": [{"name": "lamp"}]}, "functions is not supported"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused(more: dict[str, Any], message: str, client: OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "one", "messages": ASK, "tools": TOOLS, **more}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**arguments)


def test_home_assistants_rounds_with_tools_are_answered(server: Running) -> None:
    # As homeassistant/components/ollama/entity.py: calls without ids, results without names.
    expected = server.runtime.generate(ASK, adapter="one", tools=TOOLS, tool_choice="lamp", **HOT).tool_calls[0]

    async def ask(messages: list[ollama.Message]) -> tuple[str, list[Any], list[Any]]:
        client = ollama.AsyncClient(host=server.url)
        try:
            content, calls, lines = "", [], []
            generator = await client.chat(
                model="one:latest",
                messages=messages,
                tools=TOOLS,
                stream=True,
                keep_alive="300s",
                options={"num_ctx": 8192, "num_predict": 30},
                think=False,
                format=None,
            )
            async for response in generator:
                message = response["message"]
                content += message.get("content") or ""
                calls += message.get("tool_calls") or []
                lines.append(response)
            return content, calls, lines
        finally:
            await client.close()

    function = ollama.Message.ToolCall.Function(name="lamp", arguments=expected.arguments)
    history = [
        ollama.Message(role="system", content="You are a voice assistant."),
        ollama.Message(role="user", content="light"),
        ollama.Message(role="assistant", content="", tool_calls=[ollama.Message.ToolCall(function=function)]),
        ollama.Message(role="tool", content=json.dumps({"data": {"area": "hall"}, "error": None})),
    ]
    content, _, lines = asyncio.run(ask(history))
    runtime_history = [
        {"role": "system", "content": "You are a voice assistant."},
        *ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "lamp", "arguments": expected.arguments}}]},
        {"role": "tool", "content": json.dumps({"data": {"area": "hall"}, "error": None})},
    ]
    answer = server.runtime.generate(runtime_history, adapter="one", tools=sent_by_ollama(), max_tokens=30)
    assert content == answer.content
    assert lines[-1].done
    assert lines[-1].prompt_eval_count == answer.timings.prompt_tokens


def test_calls_come_as_ollamas_clients_expect_them(start: Start, tools_bundle: Path) -> None:
    server = start(tools_bundle, contexts=1)
    # With this template an answer that begins with a brace is a call. One of these seeds begins with one.
    loaded_bundle(server.runtime).context()[0].engine.tokenizer.chat_template = FAMILIES["llama3"]
    hot: dict[str, Any] = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    tools = sent_by_ollama()
    for seed in range(5000):
        if server.runtime.generate(ASK, tools=tools, seed=seed, max_tokens=1, **hot).text == "{":
            break
    answer = server.runtime.generate(ASK, tools=tools, seed=seed, max_tokens=400, **hot)
    assert answer.tool_calls
    options = {**hot, "seed": seed, "num_predict": 400}
    body: dict[str, Any] = {"model": "home", "messages": ASK, "tools": TOOLS, "options": options}
    with ollama.Client(server.url) as client:
        reply = client.chat(**body)
        lines = list(client.chat(**body, stream=True))
    wanted = [(call.name, call.arguments) for call in answer.tool_calls]
    assert [(call.function.name, call.function.arguments) for call in reply.message.tool_calls] == wanted
    assert reply.message.content == answer.content
    calls = [call for line in lines for call in line.message.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == wanted
    assert lines[-1].done
    assert not lines[-1].message.tool_calls


def test_a_system_prompt_and_tools_that_come_again_are_not_computed_again(server: Running) -> None:
    def cached(text: str) -> int:
        messages = [{"role": "system", "content": "you switch lamps " * 6}, {"role": "user", "content": text}]
        body = {"model": "one", "messages": messages, "tools": TOOLS, "max_tokens": 2}
        usage = server.client.post("/v1/chat/completions", json=body).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] - found < 200 or not found
        return found

    first, second = cached("light"), cached("play")
    server.client.post("/v1/chat/completions", json={"model": "home", "messages": ASK, "max_tokens": 1})
    assert (first, cached("stop")) == (0, second)
    assert second > 300


def test_logprobs_come_in_the_shape_of_each_api(server: Running, client: OpenAI) -> None:
    answer = server.runtime.generate(ASK, adapter="one", max_tokens=5, logprobs=2)
    assert answer.logprobs is not None
    wanted = [(token.text, pytest.approx(token.logprob)) for token in answer.logprobs]
    chat = client.chat.completions.create(model="one", messages=ASK, max_tokens=5, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [(token.token, token.logprob) for token in content] == wanted
    assert [len(token.top_logprobs) for token in content] == [2] * len(wanted)
    assert bytes(content[0].bytes or []).decode("utf-8", "replace") == content[0].token
    assert client.chat.completions.create(model="one", messages=ASK, max_tokens=1).choices[0].logprobs is None
    *_, last = client.chat.completions.create(model="one", messages=ASK, max_tokens=5, logprobs=True, stream=True)
    assert last.choices[0].logprobs is not None
    assert [(token.token, token.logprob) for token in last.choices[0].logprobs.content or []] == wanted
    text = client.completions.create(model="one", prompt="light", max_tokens=5, logprobs=3).choices[0]
    assert text.logprobs is not None
    assert text.logprobs.tokens is not None
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset == [sum(map(len, text.logprobs.tokens[:n])) for n in range(5)]
    assert [len(top) for top in text.logprobs.top_logprobs or []] == [3] * 5
    with ollama.Client(server.url) as other:
        reply = other.chat("one", ASK, options={"num_predict": 5}, logprobs=True, top_logprobs=2)
        # Ollama ignores it alone.
        assert other.chat("one", ASK, options={"num_predict": 1}, top_logprobs=2).logprobs is None
    assert reply.logprobs is not None
    assert [(token.token, token.logprob) for token in reply.logprobs] == wanted
    assert all(math.isfinite(other.logprob) for token in reply.logprobs for other in token.top_logprobs or [])
    with pytest.raises(openai.BadRequestError, match="logprobs is 21"):
        client.chat.completions.create(model="one", messages=ASK, logprobs=True, top_logprobs=21)
