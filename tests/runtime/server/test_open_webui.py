"""The calls that Open WebUI makes as a client of Ollama, as in its routers/ollama.py and utils/payload.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from edgetune_runtime.server.settings import Access
from runtime.server.conftest import Running, Start, started

KEY = "a key of the test 123456"
HOST = "host.docker.internal"
PROMPT = "turn on the light"
OPTIONS = {
    "temperature": 0.0,
    "top_p": 0.9,
    "seed": 42,
    "stop": ["<|stop|>"],
    "num_predict": 12,
    "num_ctx": 2048,
    "repeat_last_n": 64,
    "presence_penalty": 0.5,
    "mirostat": 0,
    "use_mmap": True,
    "num_thread": 4,
}
"""All kinds that the page `Advanced Params` can set."""


class OpenWebUI:
    """Sends what Open WebUI in a container sends to a server on its host."""

    def __init__(self, server: Running) -> None:
        self.url = server.url
        self._client = server.client
        self._client.headers.update({"Host": f"{HOST}:{server.port}", "Authorization": f"Bearer {KEY}"})

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        response = self._client.get(path, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, payload: dict[str, Any]) -> httpx.Response:
        return self._client.post(path, content=json.dumps(payload), headers={"Content-Type": "application/json"})

    def models(self) -> dict[str, dict[str, Any]]:
        """The models of its menu, with the time at which each is unloaded."""
        models = {model["model"]: model for model in self.get("/api/tags").get("models", [])}
        for loaded in self.get("/api/ps")["models"]:
            expires = datetime.fromisoformat(loaded["expires_at"])
            models[loaded["model"]]["expires_at"] = int(expires.timestamp())
        return models

    def chat(self, **payload: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
        """The lines of a streamed chat, each read as one JSON object."""
        response = self.post("/api/chat", {"stream": True, **payload})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.text.splitlines()]


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with started(bundle, access=Access(keys=(KEY,), hosts=(HOST,))) as running:
        yield running


@pytest.fixture(scope="module")
def webui(server: Running) -> OpenWebUI:
    return OpenWebUI(server)


def test_a_connection_is_verified_by_the_version(webui: OpenWebUI) -> None:
    version = webui.get("/api/version")["version"]
    assert len([int(part) for part in re.sub(r"^v|-.*", "", version).split(".")]) >= 2
    # The key is wrong, or the host is not allowed: it shows the member `error`.
    for header in ({"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}", "Host": "other"}):
        response = httpx.get(f"{webui.url}/api/version", headers=header)
        assert response.status_code in (401, 421)
        assert response.json()["error"]


def test_the_menu_lists_all_models_as_loaded(webui: OpenWebUI) -> None:
    models = webui.models()
    assert list(models) == ["home:latest", "command:latest", "tone:latest", "whole:latest"]
    for model in models.values():
        assert model["name"] == model["model"]
        assert model["expires_at"] > datetime.now(UTC).timestamp()
    shown = webui.post("/api/show", {"model": "command:latest"}).json()
    assert "completion" in shown["capabilities"]


def test_a_chat_streams_with_all_options_of_the_page(server: Running, webui: OpenWebUI) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    expected = server.runtime.generate(messages, adapter="command", max_tokens=12)
    lines = webui.chat(model="command:latest", messages=messages, options=OPTIONS, keep_alive="5m", format="")
    assert "".join(line["message"]["content"] for line in lines) == expected.text
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    last = lines[-1]
    # It divides these by each other, and shows them below the answer.
    assert last["eval_count"] / (last["eval_duration"] / 10_000_000) > 0
    assert last["prompt_eval_count"] / (last["prompt_eval_duration"] / 10_000_000) > 0
    assert last["total_duration"] // 1_000_000_000 >= 0
    assert last["load_duration"] >= 0


def test_a_title_is_asked_for_in_one_piece(server: Running, webui: OpenWebUI) -> None:
    # `max_tokens` becomes a member beside `options`, which Ollama does not know.
    payload = {"model": "home:latest", "messages": [{"role": "user", "content": PROMPT}], "num_predict": 1000}
    reply = webui.post("/api/chat", {**payload, "stream": False, "options": {"num_predict": 8}}).json()
    assert reply["message"]["content"] == server.runtime.generate(PROMPT, max_tokens=8).text


def test_a_conversation_continues_after_a_tool_call(tools_bundle: Path, start: Start) -> None:
    webui = OpenWebUI(start(tools_bundle, access=Access(keys=(KEY,), hosts=(HOST,))))
    call = {"index": 0, "id": "call_1", "function": {"name": "lamp", "arguments": {"area": "hall"}}}
    function = {"name": "lamp", "description": "Switch a lamp", "parameters": {"type": "object", "properties": {}}}
    messages = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "tool_calls": [call], "content": ""},
        {"role": "tool", "content": "done", "tool_call_id": "call_1"},
    ]
    tools = [{"type": "function", "function": function}]
    lines = webui.chat(model="home:latest", messages=messages, tools=tools, options={"num_predict": 4})
    assert lines[-1]["done"]


def test_unloading_a_model_succeeds_and_leaves_it_there(webui: OpenWebUI) -> None:
    reply = webui.post("/api/generate", {"model": "command:latest", "keep_alive": 0, "prompt": ""})
    assert reply.status_code == 200
    assert (reply.json()["done"], reply.json()["done_reason"]) == (True, "unload")
    messages = [{"role": "user", "content": PROMPT}]
    assert webui.chat(model="command:latest", messages=messages, options={"num_predict": 1})[-1]["done"]


def test_an_error_is_a_text(webui: OpenWebUI) -> None:
    messages = [{"role": "user", "content": PROMPT, "images": ["aGk="]}]
    response = webui.post("/api/chat", {"model": "command:latest", "messages": messages, "stream": True})
    assert response.status_code == 400
    assert "images is not supported" in response.json()["error"]


def test_documents_are_embedded_in_batches(encoder_bundle: Path, start: Start) -> None:
    webui = OpenWebUI(start(encoder_bundle, access=Access(keys=(KEY,), hosts=(HOST,))))
    vectors = webui.post("/api/embed", {"input": ["play", "stop"], "model": "home"}).json()["embeddings"]
    assert [sum(value * value for value in vector) for vector in vectors] == pytest.approx([1, 1])
    payload = {"model": "home:latest", "input": ["play"], "truncate": True, "options": {}, "keep_alive": "5m"}
    assert webui.post("/api/embed", payload).json()["embeddings"] == [vectors[0]]
