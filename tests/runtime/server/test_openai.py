from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Literal

import httpx
import openai
import pytest
from edgetune_runtime.decoding.library import library
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from runtime.server.conftest import Running, Start
from waiting import wait_for

PROMPT = "turn on the light"
MESSAGES = [{"role": "user", "content": PROMPT}]


def test_models_are_the_base_and_its_adapters_with_their_parent(client: OpenAI) -> None:
    found = {model.id: model.parent for model in client.models.list()}
    assert found == {"home": None, "command": "home", "tone": "home", "whole": "home"}
    assert client.models.retrieve("command").id == "command"
    with pytest.raises(openai.NotFoundError, match="comand"):
        client.models.retrieve("comand")


@pytest.mark.parametrize("model", ["home", "command", "tone", "whole", "command:latest"])
def test_an_answer_is_that_of_the_runtime(model: str, server: Running, client: OpenAI) -> None:
    name = model.removesuffix(":latest")
    expected = server.runtime.generate(PROMPT, adapter=None if name == "home" else name, max_tokens=12)
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12)
    assert reply.model == model
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == ("stop" if expected.stop_reason == "end" else "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == expected.tokens
    assert reply.usage.prompt_tokens == expected.timings.prompt_tokens


def test_a_stream_has_the_same_text_and_ends_with_its_usage(server: Running, client: OpenAI) -> None:
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model="command",
            messages=MESSAGES,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected.text
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.tokens
    assert chunks[-1].timings["ttft_ms"] > 0  # type: ignore[attr-defined]
    without = client.chat.completions.create(model="command", messages=MESSAGES, max_tokens=2, stream=True)
    assert all(chunk.usage is None for chunk in without)


def test_several_adapters_answer_with_their_scales_by_name_or_by_an_extra_member(
    server: Running, client: OpenAI
) -> None:
    scales = {"command": 0.7, "tone": 0.3}
    expected = server.runtime.generate(PROMPT, adapter=scales, max_tokens=10).text
    assert expected != server.runtime.generate(PROMPT, adapter="command", max_tokens=10).text

    def answer(model: str, **extra: object) -> str | None:
        reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=10, extra_body=extra)
        return reply.choices[0].message.content

    assert answer("command:0.7+tone:0.3") == expected
    assert answer("command:0.7+tone:0.3:latest") == expected
    assert answer("home", adapters=scales) == expected
    own = server.runtime.generate(PROMPT, adapter={"command": 1.0, "tone": 0.5}, max_tokens=10).text
    assert answer("command+tone") == own
    assert answer("home", adapters=["command", "tone"]) == own


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "comand"}, "model 'comand' not found; choose one of: home, command, tone, whole"),
        ({"model": "command:7b"}, "model 'command:7b' not found"),
        ({"model": "command+command"}, "not found"),
        ({"model": "command+whole"}, "merged"),
        ({"model": "../../etc/passwd"}, "not found"),
        ({"model": "home", "extra_body": {"adapters": {"comand": 1}}}, "no adapter 'comand'"),
        ({"model": "command", "extra_body": {"adapters": ["tone"]}}, "is an adapter"),
        ({"temperature": "hot"}, 'temperature is "hot"; give a number'),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens 0 is not an integer of at least 1"),
        ({"n": 100}, "n is 100; give 1 to 8"),
        ({"n": 0}, "n is 0"),
        ({"messages": []}, "messages is"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role is \"robot\""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content\[0\].type"),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}, *MESSAGES]},
            r"messages\[0\].function_call is not supported",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "none"}},
            },
            "tool_choice names the function 'none', which would be taken for a mode; rename it",
        ),
        ({"frequency_penalty": 1.0}, "frequency_penalty is not supported"),
        ({"top_logprobs": 3}, "top_logprobs is 3; give logprobs: true beside it"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}}, "schema"),
        ({"stop": [3]}, "stop is"),
        ({"messages": [{"role": "user", "content": "play " * 400}]}, "the context allows"),
    ],
)
def test_an_invalid_request_raises_the_clients_own_error(
    extra: dict[str, object], message: str, client: OpenAI
) -> None:
    arguments = {"model": "command", "messages": MESSAGES, **extra}
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    expected = openai.NotFoundError if "not found" in message or "no adapter" in message else openai.BadRequestError
    assert type(caught.value) is expected
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"].count("\n") == 0


def test_errors_have_openais_codes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="home", messages=[{"role": "user", "content": "play " * 400}])
    assert long.value.code == "context_length_exceeded"
    assert long.value.type == "invalid_request_error"


class Order(BaseModel):
    device: Literal["lamp", "heater"]
    on: bool


def test_a_parsed_answer_is_an_object_of_the_class(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="command", messages=MESSAGES, response_format=Order, max_tokens=100, temperature=1.5, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Order)


def test_json_object_is_any_json_object(client: OpenAI) -> None:
    whole = 0
    for seed in range(8):
        reply = client.chat.completions.create(
            model="home", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=200, temperature=1,
            seed=seed,
        )  # fmt: skip
        content = reply.choices[0].message.content
        assert content is not None
        assert content.startswith("{")
        if reply.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(content), dict)
            whole += 1
    assert whole


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_json_object_with_a_schema_fits_it(path: str, server: Running) -> None:
    schema = {"type": "object", "properties": {"lamp": {"const": 1}}, "required": ["lamp"]}
    form = {"type": "json_object", "schema": schema}
    body = {"model": "command", "messages": MESSAGES, "response_format": form, "max_tokens": 60}
    if path == "/v1/responses":
        body = {"model": "command", "input": PROMPT, "text": {"format": form}}
    reply = server.client.post(path, json=body).json()
    text = reply["choices"][0]["message"]["content"] if "choices" in reply else reply["output"][0]["content"][0]["text"]
    assert json.loads(text)["lamp"] == 1


def test_a_library_that_the_server_lacks_is_no_fault_of_the_client(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start()
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": "command", "messages": MESSAGES, "response_format": {"type": "json_object"}}
    response = server.client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "llguidance, which is not installed" in caplog.text


def test_stop_texts_end_an_answer(server: Running, client: OpenAI) -> None:
    whole = server.runtime.generate(PROMPT, adapter="command", max_tokens=30).text
    stop = whole[5:8]
    reply = client.chat.completions.create(model="command", messages=MESSAGES, max_tokens=30, stop=[stop, "zzz"])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_values_that_other_servers_take_mean_the_same_here(server: Running) -> None:
    def answer(**options: object) -> dict[str, str | int]:
        body = {"model": "command", "messages": MESSAGES, "temperature": 2, "max_tokens": 12, **options}
        reply = server.client.post("/v1/chat/completions", json=body).json()
        return {"text": reply["choices"][0]["message"]["content"], "tokens": reply["usage"]["completion_tokens"]}

    for name in ("max_tokens", "max_completion_tokens"):
        assert answer(temperature=0, **{"max_tokens": None, name: -1}) == answer(temperature=0, max_tokens=1024)
    assert len({answer(seed=-1)["text"] for _ in range(4)}) > 1
    assert answer(seed=1, top_k=-1) == answer(seed=1, top_k=0)
    assert answer(top_p=0, stop=["", "no such text"]) == answer(temperature=0)


def test_a_seed_repeats_an_answer_and_n_answers_to_one_prompt_differ(client: OpenAI) -> None:
    one = client.chat.completions.create(model="command", messages=MESSAGES, max_tokens=8)

    def answers(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model="command", messages=MESSAGES, max_tokens=8, temperature=2.0, seed=seed, n=3
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert reply.usage is not None and one.usage is not None
        assert reply.usage.prompt_tokens == one.usage.prompt_tokens
        return [choice.message.content for choice in reply.choices]

    first = answers(1)
    assert answers(1) == first
    assert len(set(first)) == 3
    assert answers(7) != first


def test_n_streamed_answers_are_told_apart_by_their_index(client: OpenAI) -> None:
    chunks = client.chat.completions.create(model="command", messages=MESSAGES, max_tokens=4, n=2, stream=True)
    texts = ["", ""]
    reasons = {}
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts[0] == texts[1] != ""
    assert reasons == {0: "length", 1: "length"}


def test_system_messages_text_parts_and_developers_are_read(server: Running, client: OpenAI) -> None:
    system, user = "play music", [{"type": "text", "text": "turn on "}, {"type": "text", "text": "the light"}]
    expected = server.runtime.generate(
        [{"role": "system", "content": system}, {"role": "user", "content": PROMPT}], adapter="command", max_tokens=8
    ).text
    for role in ("system", "developer"):
        messages = [{"role": role, "content": system}, {"role": "user", "content": user}]
        reply = client.chat.completions.create(model="command", messages=messages, max_tokens=8)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == expected


def test_a_system_message_without_text_leaves_the_adapter_its_own(server: Running) -> None:
    def tokens(path: str, *messages: dict[str, str]) -> int:
        body = {"model": "command", "messages": [*messages, *MESSAGES], "max_tokens": 2, "stream": False}
        reply = server.client.post(path, json=body).json()
        return int(reply["usage"]["prompt_tokens"] if "usage" in reply else reply["prompt_eval_count"])

    for path in ("/v1/chat/completions", "/api/chat"):
        empty, other = ({"role": "system", "content": text} for text in ("", "play music"))
        assert tokens(path, empty) == tokens(path) != tokens(path, other)


def test_completions_answer_several_prompts_and_stream(server: Running, client: OpenAI) -> None:
    reply = client.completions.create(model="command", prompt=["play", "stop"], max_tokens=6)
    assert [choice.index for choice in reply.choices] == [0, 1]
    streamed = client.completions.create(model="command", prompt="play", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == reply.choices[0].text
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12


def test_embeddings_of_a_bundle_that_generates_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="it has no encoder"):
        client.embeddings.create(model="home", input="play")


def test_the_asynchronous_client_gets_answers_at_the_same_time(server: Running) -> None:
    async def main() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8)  # type: ignore[arg-type]
                    for model in ["command", "tone", "home"] * 4
                )
            )
            return [reply.choices[0].message.content for reply in replies]

    alone = [server.runtime.generate(PROMPT, adapter=name, max_tokens=8).text for name in ("command", "tone", None)]
    assert asyncio.run(main()) == alone * 4


def test_a_client_that_leaves_in_the_middle_frees_its_context_at_once(start: Start) -> None:
    server = start(contexts=1)
    expected = server.runtime.generate(PROMPT, adapter="tone", max_tokens=8).text
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(model="command", messages=MESSAGES, max_tokens=230, stream=True)
        next(iter(stream))
        assert not server.is_idle
        stream.close()
        wait_for(lambda: server.is_idle)
        reply = client.chat.completions.create(model="tone", messages=MESSAGES, max_tokens=8)
        assert reply.choices[0].message.content == expected


def test_a_client_that_stops_waiting_for_a_whole_answer_frees_its_context(start: Start) -> None:
    server = start(contexts=1, context_length=512)
    # Eight times as long as the answer that is timed, which other load may slow down.
    body = {"model": "command", "messages": MESSAGES, "max_tokens": 490, "n": 8}
    begin = time.monotonic()
    server.runtime.generate(PROMPT, adapter="command", max_tokens=490)
    whole_s = time.monotonic() - begin
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=whole_s / 4)
    begin = time.monotonic()
    wait_for(lambda: server.is_idle)
    assert time.monotonic() - begin < whole_s
    counted = 'edgetune_requests_total{route="/v1/chat/completions",status="499"} 1.0'
    wait_for(lambda: counted in server.client.get("/metrics").text)
