"""Labels over HTTP: what `Runtime.classify` gives, how sure it is, and the log of answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import CLASSIFY
from httpx import Response
from runtime.bundles import add_router
from runtime.server.conftest import Running, Start, started
from runtime.server.test_health import figures

PATH = "/v1/classify"
TEXTS = ["play", "set heat to warm"]


@pytest.fixture(scope="module")
def sure(sure_bundle: Path) -> Iterator[Running]:
    """A server of a bundle whose labels have a confidence."""
    with started(sure_bundle) as running:
        yield running


def post(server: Running, **body: Any) -> Response:  # noqa: ANN401 - of a request
    return server.client.post(PATH, json={"model": "tone", "input": TEXTS, **body})


def test_each_text_gets_the_label_that_the_runtime_gives(sure: Running) -> None:
    reply = post(sure)
    assert (reply.json()["object"], reply.json()["model"]) == ("list", "tone")
    for index, (text, one) in enumerate(zip(TEXTS, reply.json()["data"], strict=True)):
        own = sure.runtime.classify(text, adapter="tone")
        assert (one["index"], one["label"], one["is_out_of_scope"]) == (index, own.label, False)
        assert one["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
        assert one["confidence"] == pytest.approx(own.confidence, abs=1e-6)
    lowest = min(one["confidence"] for one in reply.json()["data"])
    assert float(reply.headers["X-Edgetune-Confidence"]) == pytest.approx(lowest, abs=1e-4)
    exact = post(sure, input="play", exact=True).json()["data"]
    assert [one["unseen"] for one in exact] == [pytest.approx(0, abs=1e-6)]


def test_a_label_that_is_less_sure_than_asked_for_is_marked_and_counted(sure: Running) -> None:
    before = figures(sure)
    reply = post(sure, min_confidence=1)
    assert [one["is_unsure"] for one in reply.json()["data"]] == [True, True]
    assert reply.headers["X-Edgetune-Unsure"] == "mark"
    after = figures(sure)
    for name in ("edgetune_unsure_answers_total", "edgetune_confidence_count"):
        assert after[f"{name} adapter=tone"] - before.get(f"{name} adapter=tone", 0) == 2


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"input": []}, 400, "input is []; give a string or a list of strings"),
        ({"input": [1]}, 400, "a string or a list of strings"),
        ({"input": ["play"] * 2049}, 400, "input has 2049 texts; send at most 2048 per request"),
        ({"labels": ["red", "green"]}, 400, "labels is not supported"),
        ({"adapters": ["command"]}, 400, "adapters is not supported"),
        ({"input": ["play", "play " * 2000]}, 400, "input[1]: the prompt has"),
        ({"model": "command"}, 400, "there are no labels to choose from"),
        ({"model": "auto"}, 404, "model 'auto' not found"),
        ({"min_confidence": 2}, 400, "min_confidence is 2"),
    ],
)
def test_a_request_that_cannot_be_answered_is_one_line(
    body: dict[str, Any], status: int, told: str, sure: Running
) -> None:
    reply = post(sure, **body)
    assert reply.status_code == status
    assert told in reply.json()["error"]["message"]


def test_the_router_chooses_among_adapters_with_labels(sure_bundle: Path, tmp_path: Path, start: Start) -> None:
    home = Path(shutil.copytree(sure_bundle, tmp_path / "home"))
    add_router(home, {CLASSIFY: {"tone": "play", "command": "lamp"}})
    server = start(home)
    (one,) = post(server, model="auto", input="play").json()["data"]
    assert (one["route"]["adapter"], one["route"]["is_known"]) == ("tone", True)
    assert "auto" in [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    chat = {"model": "auto", "messages": [{"role": "user", "content": "play"}]}
    told = server.client.post("/v1/chat/completions", json=chat).json()["error"]["message"]
    assert told == "model 'auto' is not for such requests; use it for /v1/classify"


def test_an_encoder_answers_with_the_labels_of_its_adapter(encoder_bundle: Path, start: Start) -> None:
    server = start(encoder_bundle)
    name = next(iter(server.runtime.adapters))
    (one,) = post(server, model=name, input="play").json()["data"]
    assert one["label"] == server.runtime.classify("play", adapter=name).label


def test_labels_are_logged_and_can_be_corrected(start: Start, tmp_path: Path) -> None:
    server = start(log=tmp_path / "answers.jsonl")
    reply = post(server).json()
    about = {"id": reply["id"], "index": 1, "correction": "calm"}
    assert server.client.post("/edgetune/corrections", json=about).status_code == 200
    entries = read_answer_log(tmp_path / "answers.jsonl", server.runtime.manifest)
    assert [(entry.adapter, entry.answer) for entry in entries] == [("tone", one["label"]) for one in reply["data"]]
    assert [entry.correction for entry in entries] == [None, "calm"]
    assert post(server, input=["play"] * 100).status_code == 200
    assert len(read_answer_log(tmp_path / "answers.jsonl", server.runtime.manifest)) == len(entries)
