"""A server on the ONNX engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime.inference.adapter_choice import Adapters
from runtime.server.conftest import Running, Start

PROMPT = "turn on the light"
MESSAGES = [{"role": "user", "content": PROMPT}]
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}


@pytest.fixture
def server(both_of: Callable[[str], Path], start: Start) -> Running:
    return start(both_of("llama"), engine="onnx")


@pytest.mark.parametrize(
    ("model", "adapters"),
    [("home", None), ("command", "command"), ("command:0.7+tone:0.3", {"command": 0.7, "tone": 0.3})],
)
def test_a_chat_with_onnx_is_answered_as_the_runtime_answers(model: str, adapters: Adapters, server: Running) -> None:
    assert server.runtime.engine == "onnx"
    expected = server.runtime.generate(PROMPT, adapter=adapters, max_tokens=12)
    body = {"model": model, "messages": MESSAGES, "max_tokens": 12}
    whole = server.client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["usage"]["completion_tokens"] == expected.tokens
    body = {"model": model, "messages": MESSAGES, "options": {"num_predict": 12}}
    with server.client.stream("POST", "/api/chat", json=body) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == expected.text
    assert lines[-1]["done"]


def test_a_schema_constrains_an_answer_of_onnx(server: Running) -> None:
    hot = {"temperature": 1.5, "seed": 2, "num_predict": 200}
    body = {"model": "command", "messages": MESSAGES, "format": SCHEMA, "options": hot, "stream": False}
    reply = server.client.post("/api/chat", json=body).json()
    assert set(json.loads(reply["message"]["content"])) == {"on"}


def test_models_say_that_they_are_onnx(server: Running) -> None:
    models = server.client.get("/api/tags").json()["models"]
    assert [model["name"] for model in models] == ["home:latest", "command:latest", "tone:latest", "whole:latest"]
    assert {model["details"]["format"] for model in models} == {"onnx"}
    assert server.client.get("/edgetune/bundle").json()["engine"] == "onnx"
