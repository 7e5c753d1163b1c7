from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from edgetune_runtime.bundle import sha256_of
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from runtime.server.conftest import Running, Start
from waiting import wait_for

CHAT = {"model": "command", "messages": [{"role": "user", "content": "play"}], "max_tokens": 4}


def figures(server: Running) -> dict[str, float]:
    """All figures of /metrics by name and labels."""
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        " ".join([sample.name, *map("=".join, sample.labels.items())]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_answers_are_counted(start: Start) -> None:
    server = start()
    usage = server.client.post("/v1/chat/completions", json=CHAT).json()["usage"]
    server.client.post("/v1/chat/completions", json={**CHAT, "model": "command:0.7+tone:0.3"})
    server.client.post("/v1/chat/completions", json={**CHAT, "model": "comand"})
    found = figures(server)
    assert found["edgetune_requests_total route=/v1/chat/completions status=200"] == 2
    assert found["edgetune_requests_total route=/v1/chat/completions status=404"] == 1
    assert found["edgetune_answer_tokens_total adapter=command"] == 4
    assert found["edgetune_prompt_tokens_total adapter=command"] == usage["prompt_tokens"]
    assert found["edgetune_answer_tokens_total adapter=several"] == 4
    assert found["edgetune_ttft_seconds_count adapter=command"] == 1
    assert 0 < found["edgetune_ttft_seconds_sum adapter=command"] < 10
    assert found["edgetune_switch_seconds_count adapter=command"] == 1
    assert found["edgetune_requests_running"] == found["edgetune_requests_waiting"] == 0
    assert found["process_resident_memory_bytes"] > 1e7


def test_states_that_are_reused_are_hits(prompted_of: Callable[[str], Path], start: Start) -> None:
    server = start(prompted_of("llama"))
    for _ in range(3):
        server.client.post("/v1/chat/completions", json={**CHAT, "model": "one"})
    found = figures(server)
    assert found["edgetune_state_misses_total adapter=one"] == 1
    assert found["edgetune_state_hits_total adapter=one"] == 2
    assert found["edgetune_prompt_tokens_reused_total adapter=one"] > 0


def test_a_server_is_ready_once_its_states_are_warm(prompted_of: Callable[[str], Path], start: Start) -> None:
    bundle = prompted_of("llama")
    server = start(bundle, warms=True)
    digest = sha256_of(bundle / "manifest.json")
    assert server.client.get("/healthz").json() == {"status": "ok", "bundle": digest}
    begin = time.monotonic()
    while (response := server.client.get("/readyz")).status_code == 503:
        assert response.json() == {"status": "warming"}
        assert time.monotonic() < begin + 30
    assert response.json() == {"status": "ready"}
    reused = [
        server.runtime.generate("play", adapter=name, max_tokens=1).timings.reused_tokens for name in ("one", "two")
    ]
    assert min(reused) > 16


def test_embeddings_come_as_numbers_or_in_base64(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle)
    with OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        # The client asks for base64 unless it is told otherwise.
        packed = client.embeddings.create(model="home", input=["play", "stop"])
        plain = client.embeddings.create(model="home", input="play", encoding_format="float")
    assert len(packed.data) == 2
    assert [round(value, 5) for value in packed.data[0].embedding] == [round(v, 5) for v in plain.data[0].embedding]
    assert packed.usage.prompt_tokens == 2 * plain.usage.prompt_tokens > 0


def test_a_bundle_without_prompts_is_ready_although_it_cannot_be_warmed(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle, warms=True)
    wait_for(lambda: server.client.get("/readyz").status_code != 503, 10)
    assert server.client.get("/v1/models").status_code == 200
