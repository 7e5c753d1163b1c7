"""A server on the ONNX engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtime.server.conftest import Running, started

PROMPT = "turn on the light"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server(both_of: Callable[[str], Path]) -> Iterator[Running]:
    with started(both_of("llama"), engine="onnx") as running:
        yield running


def test_a_chat_with_onnx_is_answered_as_the_runtime_answers(server: Running) -> None:
    assert server.runtime.engine == "onnx"
    expected = server.runtime.generate(PROMPT, adapter="command", max_tokens=12)
    body = {"model": "command", "messages": MESSAGES, "max_tokens": 12}
    whole = server.client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["usage"]["completion_tokens"] == expected.tokens
    body = {"model": "command", "messages": MESSAGES, "options": {"num_predict": 12}}
    with server.client.stream("POST", "/api/chat", json=body) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == expected.text
    assert lines[-1]["done"]


def test_models_say_that_they_are_onnx(server: Running) -> None:
    models = server.client.get("/api/tags").json()["models"]
    assert [model["name"] for model in models] == ["home:latest", "command:latest", "tone:latest", "whole:latest"]
    assert {model["details"]["format"] for model in models} == {"onnx"}
    assert server.client.get("/edgetune/bundle").json()["engine"] == "onnx"
