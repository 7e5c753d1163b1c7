"""The model `auto` of a bundle with a router, in both APIs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ollama
import pytest
from edgetune_runtime.bundle import BASE, ERROR, GENERATE
from openai import BadRequestError, OpenAI
from runtime.bundles import add_router
from runtime.server.conftest import Running, Start, started


@pytest.fixture(scope="module")
def routed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a bundle with a router."""
    with started(with_router(bundle, tmp_path_factory.mktemp("routed") / "home")) as running:
        yield running


def with_router(bundle: Path, home: Path, below: str = BASE) -> Path:
    shutil.copytree(bundle, home)
    add_router(home, {GENERATE: {"command": "lamp", "whole": "music"}}, below)
    return home


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(("text", "model"), [("the lamp", "command"), ("music", "whole"), ("who is there", "home")])
def test_openai_answers_name_the_model_that_answered(text: str, model: str, routed: Running) -> None:
    with OpenAI(base_url=f"{routed.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.chat.completions.create(model="auto", messages=messages(text), max_tokens=3)
        assert answer.model == model
        assert answer.model_extra is not None
        assert answer.model_extra["route"]["is_known"] == (model != "home")
        named = client.chat.completions.create(model=model, messages=messages(text), max_tokens=3)
        assert named.choices[0].message.content == answer.choices[0].message.content
        parts = list(client.chat.completions.create(model="auto", messages=messages(text), max_tokens=3, stream=True))
        assert {part.model for part in parts} == {model}
        response = client.responses.create(model="auto", input=text, max_output_tokens=3)
        assert response.model == model


def test_rules_for_unsure_answers_apply_where_they_can(sure_bundle: Path, tmp_path: Path, start: Start) -> None:
    server = start(with_router(sure_bundle, tmp_path / "home"))
    for text, more in (
        ("who is there", {"min_confidence": 0.9}),
        ("music", {"min_confidence": 0.9}),
        ("the lamp", {"min_confidence": 1, "unsure": "command"}),
        ("the lamp", {"unsure": "base"}),
        ("who is there", {"ask": "Which room?"}),
    ):
        body = {"model": "auto", "messages": messages(text), "max_tokens": 3, **more}
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200
        options = {"num_predict": 3, **more}
        body = {"model": "auto", "messages": messages(text), "stream": False, "options": options}
        assert server.client.post("/api/chat", json=body).status_code == 200
    body = {"model": "command", "messages": messages("the lamp"), "max_tokens": 3, "min_confidence": 1}
    assert server.client.post("/v1/chat/completions", json={**body, "unsure": "command"}).status_code == 400


def test_a_raw_prompt_is_refused(routed: Running) -> None:
    client = OpenAI(base_url=f"{routed.url}/v1", api_key="-", max_retries=0)
    with client, pytest.raises(BadRequestError, match="raw prompt"):
        client.completions.create(model="auto", prompt="the lamp")


def test_a_prompt_of_no_task_is_refused_if_the_bundle_says_so(bundle: Path, tmp_path: Path, start: Start) -> None:
    server = start(with_router(bundle, tmp_path / "home", ERROR))
    body = {"model": "auto", "messages": messages("who is there")}
    reply = server.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "none of the tasks" in reply.json()["error"]["message"]


def test_ollama_answers_name_the_model_that_answered(routed: Running) -> None:
    with ollama.Client(routed.url) as client:
        assert "auto:latest" in [model.model for model in client.list().models]
        assert client.show("auto").details is not None
        parts = list(client.chat("auto:latest", messages("the lamp"), stream=True))
        assert {part.model for part in parts} == {"command"}
    last = routed.client.post("/api/generate", json={"model": "auto", "prompt": "music"}).text.splitlines()[-1]
    assert json.loads(last)["route"]["adapter"] == "whole"
    assert routed.client.post("/api/generate", json={"model": "auto"}).json()["done_reason"] == "load"


def test_a_bundle_without_a_router_has_no_model_auto(server: Running) -> None:
    assert server.client.post("/api/show", json={"model": "auto"}).status_code == 404
