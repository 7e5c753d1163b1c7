"""Names of models: what the APIs show of each, and what a chat makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ollama
import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.server.models import Models
from edgetune_runtime.server.problems import RequestError
from openai import NotFoundError, OpenAI
from runtime.server.conftest import Running, Start

SEVERAL = ("command+tone", "command:0.7+tone:0.3", "command:0.7+tone:0.3:latest", "command:0.5")


def can_chat(server: Running, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "play"}], "max_tokens": 1}
    return server.client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("model", SEVERAL)
def test_combined_adapters_are_shown_by_both_apis(model: str, server: Running) -> None:
    assert can_chat(server, model)
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        shown = client.models.retrieve(model)
    assert (shown.id, shown.owned_by) == (model.removesuffix(":latest"), "home")
    with ollama.Client(server.url) as other:
        found = other.show(model)
    assert found.capabilities == ["completion", "tools"]
    assert found.details is not None
    assert found.details.parent_model == "home"


@pytest.mark.parametrize("model", ["comand", "command+comand", "command+command", "command:hot", "command:nan", "+"])
def test_a_name_that_no_chat_can_use_is_not_shown(model: str, server: Running) -> None:
    assert not can_chat(server, model)
    assert server.client.post("/api/show", json={"model": model}).status_code == 404
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client, pytest.raises(NotFoundError):
        client.models.retrieve(model)


def test_combined_adapters_have_the_size_of_all_and_a_digest_of_their_scales(bundle: Path) -> None:
    with Runtime.open(bundle) as runtime:
        models = Models(runtime.manifest, runtime.engine)
    one, two = models.info("command"), models.info("tone")
    both = models.info("command:0.7+tone:0.3")
    assert both.bytes == one.bytes + two.bytes
    assert both.digest == models.info("tone:0.3+command:0.7").digest
    assert len({both.digest, models.info("command:0.3+tone:0.7").digest, one.digest, two.digest}) == 4
    assert models.info("command+tone").digest == models.info("command:1+tone:0.5").digest
    assert [models.info(name).kind for name in ("home", "command", "command+tone")] == ["base", "adapter", "several"]


def test_adapters_without_files_for_the_engine_are_not_shown(bundle: Path) -> None:
    with Runtime.open(bundle) as runtime:
        adapters = runtime.manifest.adapters
        adapters = {**adapters, "tone": replace(adapters["tone"], files={})}
        models = Models(replace(runtime.manifest, adapters=adapters), runtime.engine)
    for name in ("tone", "command+tone"):
        with pytest.raises(RequestError, match="not found"):
            models.info(name)


def test_embeddings_are_the_bases_whatever_the_model(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle)
    replies = [
        server.client.post("/api/embed", json={"model": model, "input": "play"}).json()["embeddings"]
        for model in ("home", "place", "place+power")
    ]
    assert replies[0] == replies[1] == replies[2]
