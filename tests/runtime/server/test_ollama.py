from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from edgetune_runtime import __version__
from edgetune_runtime.server.settings import Access
from runtime.conftest import SYSTEM
from runtime.server.conftest import Running, Start

PROMPT = "turn on the light"
MESSAGES = [{"role": "user", "content": PROMPT}]
SHORT = {"num_predict": 12}
KEY = "a key of the test 123456"


@pytest.fixture
def client(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as client:
        yield client


def test_models_are_listed_with_their_tag_as_clients_expect_them(client: ollama.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == ["home:latest", "command:latest", "tone:latest", "whole:latest"]
    assert all(model.size and model.digest and model.modified_at for model in models)
    assert models[1].details is not None
    assert models[1].details.parent_model == "home"
    assert models[1].details.format == "gguf"
    assert [model.model for model in client.ps().models] == [model.model for model in models]
    assert all(model.expires_at and model.expires_at > datetime.now(UTC) for model in client.ps().models)


def test_a_model_is_shown_with_its_architecture_and_context(client: ollama.Client) -> None:
    for name in ("command", "command:latest"):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "tools"]
        assert shown.modelinfo is not None
        assert shown.modelinfo["llama.context_length"] == 256
        assert shown["system" if "system" in shown else "details"]
    with pytest.raises(ollama.ResponseError, match="model 'comand' not found") as caught:
        client.show("comand")
    assert caught.value.status_code == 404


def test_the_version_is_one_that_clients_can_compare(server: Running) -> None:
    # Open WebUI splits it at its dots and turns the parts into numbers.
    told = server.client.get("/api/version").json()
    assert told["edgetune"] == __version__
    assert all(part.isdecimal() for part in told["version"].split("."))
    # Editors refuse Ollama before 0.6.4, which could not call tools well.
    assert [int(part) for part in told["version"].split(".")] > [0, 6, 4]


def test_pulling_a_model_that_is_there_succeeds(client: ollama.Client) -> None:
    assert client.pull("command").status == "success"
    assert [step.status for step in client.pull("command:0.5+tone", stream=True)][-1] == "success"
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.pull("llama3.2")


@pytest.mark.parametrize("model", ["home", "command:latest", "tone"])
def test_an_answer_is_that_of_the_runtime(model: str, server: Running, client: ollama.Client) -> None:
    name = model.partition(":")[0]
    expected = server.runtime.generate(PROMPT, adapter=None if name == "home" else name, max_tokens=12)
    reply = client.chat(model, MESSAGES, options=SHORT)
    assert (reply.model, reply.message.role, reply.message.content) == (model, "assistant", expected.text)
    # The label of `tone` is whole.
    assert (reply.done, reply.done_reason) == (True, "stop" if model == "tone" else "length")
    assert reply.eval_count == expected.tokens
    assert reply.prompt_eval_count == expected.timings.prompt_tokens
    assert reply.total_duration is not None
    assert reply.prompt_eval_duration is not None
    assert reply.eval_duration is not None
    assert reply.total_duration >= reply.prompt_eval_duration > 0
    # A label comes in one step.
    assert (reply.eval_duration > 0) is (model != "tone")


@pytest.mark.parametrize("keep_alive", [-1, 0, 300, 1.5, "5m", "-1s", "1h30m", "0"])
def test_keep_alive_is_accepted_in_all_its_forms(keep_alive: float | str, client: ollama.Client) -> None:
    assert client.chat("home", MESSAGES, options={"num_predict": 1}, keep_alive=keep_alive).done


def test_a_stream_is_a_json_object_per_line(server: Running) -> None:
    body = {"model": "command", "messages": MESSAGES, "options": SHORT}
    with server.client.stream("POST", "/api/chat", json=body) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.iter_lines()]
    assert all(not line["done"] and line["message"]["content"] for line in lines[:-1])
    assert lines[-1]["done"]
    assert lines[-1]["message"]["content"] == ""
    assert lines[-1]["eval_count"] == 12
    assert len(lines) > 5


def test_generate_answers_a_prompt_with_the_adapters_or_another_system_prompt(
    server: Running, client: ollama.Client
) -> None:
    own = client.generate("command", PROMPT, options=SHORT).response
    assert own == server.runtime.generate(PROMPT, adapter="command", max_tokens=12).text
    assert client.generate("command", PROMPT, system=SYSTEM, options=SHORT).response == own
    assert client.generate("command", PROMPT, system="play music", options=SHORT).response != own
    pieces = client.generate("command", PROMPT, options=SHORT, stream=True)
    assert "".join(piece.response or "" for piece in pieces) == own


def test_an_empty_request_loads_or_unloads_a_model(client: ollama.Client) -> None:
    assert client.chat("command").done_reason == "load"
    assert client.generate("command", keep_alive=0).done_reason == "unload"
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.generate("comand")


def test_a_format_constrains_the_answer(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    hot = {"temperature": 1.5, "seed": 2, "num_predict": 200}
    content = client.chat("command", MESSAGES, format=schema, options=hot).message.content
    assert content is not None
    assert set(json.loads(content)) == {"on"}
    content = client.chat("command", MESSAGES, format="json", options=hot).message.content
    assert content is not None
    assert content.startswith("{")


def test_options_change_the_answer(server: Running, client: ollama.Client) -> None:
    whole = server.runtime.generate(PROMPT, adapter="command", max_tokens=30).text
    stop = whole[4:7]
    reply = client.chat("command", MESSAGES, options={"stop": [stop], "num_predict": 30, "num_gpu": 0, "num_ctx": 64})
    assert (reply.message.content, reply.done_reason) == (whole[: whole.index(stop)], "stop")
    hot = {"temperature": 2.0, "seed": 5, **SHORT}
    first = client.chat("command", MESSAGES, options=hot).message.content
    assert client.chat("command", MESSAGES, options=hot).message.content == first
    assert client.chat("command", MESSAGES, options={**hot, "seed": 6}).message.content != first
    for count in (-1, 0):
        unlimited = client.chat("command", MESSAGES, options={"num_predict": count})
        assert unlimited.eval_count is not None
        assert unlimited.eval_count > 100
    several = client.chat("home", MESSAGES, options={"adapters": {"command": 0.7, "tone": 0.3}, **SHORT})
    assert several.message.content == client.chat("command:0.7+tone:0.3", MESSAGES, options=SHORT).message.content


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"model": "comand"}, 404, "not found"),
        ({"think": True}, 400, "does not support thinking"),
        ({"format": "xml"}, 400, 'format is "xml"'),
        ({"keep_alive": "soon"}, 400, "keep_alive"),
        ({"options": {"temperature": "hot"}}, 400, "options.temperature"),
        ({"options": [1]}, 400, "options is"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images is not supported"),
        ({"messages": "x"}, 400, "messages is"),
        ({"stream": "yes"}, 400, "stream is"),
    ],
)
def test_an_invalid_request_is_a_one_line_error(
    more: dict[str, Any], status: int, message: str, server: Running
) -> None:
    response = server.client.post("/api/chat", json={"model": "command", "messages": MESSAGES, **more})
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert message in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_key_is_sent_as_home_assistant_sends_it(start: Start) -> None:
    server = start(access=Access(keys=(KEY,)))

    async def models(key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else None
        client = ollama.AsyncClient(host=server.url, headers=headers)
        try:
            return len((await client.list()).models)
        finally:
            await client.close()

    assert asyncio.run(models(KEY)) == 4
    for wrong in ("another key", None):
        with pytest.raises(ollama.ResponseError) as caught:
            asyncio.run(models(wrong))
        # Home Assistant asks for another key at 401 and 403.
        assert caught.value.status_code == 401


def test_embeddings_of_an_encoder_have_length_1(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle)
    vector, tokens = server.runtime.embed(PROMPT)
    with ollama.Client(server.url) as client:
        reply = client.embed("home", [PROMPT, "play"])
        assert reply.prompt_eval_count is not None
        assert reply.prompt_eval_count > tokens
        assert client.show("home").capabilities == ["embedding"]
        with pytest.raises(ollama.ResponseError, match="only classifies text"):
            client.chat("place", MESSAGES)
        old = client.embeddings("home", PROMPT)
        assert list(old.embedding) == pytest.approx(list(reply.embeddings[0]))
        with pytest.raises(ollama.ResponseError, match="not found"):
            client.embeddings("comand", PROMPT)
        with pytest.raises(ollama.ResponseError, match="prompt is"):
            client.embeddings("home", "")
    length = sum(value * value for value in vector) ** 0.5
    assert list(reply.embeddings[0]) == pytest.approx([value / length for value in vector], abs=1e-6)
    assert sum(value * value for value in reply.embeddings[1]) == pytest.approx(1)


def test_a_request_of_ollamas_own_command_line_finds_the_server(server: Running) -> None:
    assert server.client.head("/").status_code == 200
    assert httpx.get(f"{server.url}/").text.startswith("edgetune-run serves home")
