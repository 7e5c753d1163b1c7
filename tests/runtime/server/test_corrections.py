"""Answers in the server's log, and their corrections over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edgetune_runtime.answer_log import redaction
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.processes.child_process import ProcessResult, run
from edgetune_runtime.server import answering
from edgetune_runtime.server.settings import Access
from httpx import Response
from openai import OpenAI
from runtime.server.conftest import Running, Start
from runtime.server.test_tools import ASK, TOOLS

KEY = "k" * 32
PATH = "/edgetune/corrections"
CHAT = {"model": "command", "messages": [{"role": "user", "content": "turn on the light"}], "max_tokens": 4}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def server(start: Start, log: Path) -> Running:
    return start(log=log)


def test_answers_of_an_adapter_are_logged_with_the_id_of_the_reply(server: Running, client: OpenAI, log: Path) -> None:
    reply = client.chat.completions.create(**CHAT, n=2, temperature=1.0, seed=1)
    streamed = list(client.chat.completions.create(**CHAT, stream=True))
    response = client.responses.create(model="tone", input="play", max_output_tokens=2)
    ollama = server.client.post("/api/chat", json={**CHAT, "options": {"num_predict": 2}, "stream": False})
    entries = read_answer_log(log, server.runtime.manifest)
    assert [entry.adapter for entry in entries] == ["command", "command", "command", "tone", "command"]
    assert [entry.answer for entry in entries[:2]] == [choice.message.content for choice in reply.choices]
    assert [entry.id for entry in entries[:2]] == [reply.id[9:], f"{reply.id[9:]}-1"]
    assert entries[2].id == streamed[0].id[9:]
    assert entries[3].id == response.id[5:]
    assert entries[4].id == ollama.json()["id"]
    assert entries[0].messages == ({"role": "user", "content": "turn on the light"},)


def test_answers_without_a_row_are_not_logged(server: Running, client: OpenAI, log: Path) -> None:
    client.chat.completions.create(**{**CHAT, "model": client.models.list().data[0].id})
    client.completions.create(model="command", prompt="turn on", max_tokens=2)
    assert read_answer_log(log, server.runtime.manifest) == []


@pytest.fixture
def held(start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """`is_redacting, released`: the first answer to redact waits until `released` is set, before servers stop."""
    is_redacting, released = threading.Event(), threading.Event()

    def redact(command: list[str], *, timeout_s: float, stdin: bytes) -> ProcessResult:
        is_redacting.set()
        assert released.wait(60)
        return run(command, timeout_s=timeout_s, stdin=stdin)

    monkeypatch.setattr(redaction, "run", redact)
    yield is_redacting, released
    released.set()


def test_another_answer_has_the_place_of_one_that_is_being_redacted(
    start: Start, log: Path, threads: ThreadPoolExecutor, held: tuple[threading.Event, threading.Event]
) -> None:
    is_redacting, released = held
    server = start(contexts=1, log=log, redact=["turn on"])
    base = server.client.get("/v1/models").json()["data"][0]["id"]
    slow = threads.submit(server.client.post, "/api/chat", json=CHAT)
    assert is_redacting.wait(30)
    assert server.client.post("/v1/chat/completions", json={**CHAT, "model": base}).status_code == 200
    assert not slow.done()
    released.set()
    name = json.loads(slow.result().text.splitlines()[-1])["id"]
    (entry,) = read_answer_log(log, server.runtime.manifest)
    assert (entry.id, entry.messages[0]["content"]) == (name, f"{redaction.REDACTED} the light")


def test_while_the_log_is_behind_answers_are_given_and_not_logged(
    start: Start,
    log: Path,
    threads: ThreadPoolExecutor,
    held: tuple[threading.Event, threading.Event],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    is_redacting, released = held
    monkeypatch.setattr(answering, "_LOG_THREADS", 1)
    monkeypatch.setattr(answering, "_MAX_WAITING_FOR_LOG", 0)
    server = start(contexts=1, log=log, redact=["secret"])
    slow = threads.submit(server.client.post, "/v1/chat/completions", json=CHAT)
    assert is_redacting.wait(30)
    assert server.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert "did not log an answer: the log of answers has 1 calls that have not ended" in caplog.text
    assert server.client.post(PATH, json={"id": "a"}).status_code == 503
    released.set()
    (entry,) = read_answer_log(log, server.runtime.manifest) if slow.result().status_code == 200 else ()
    assert slow.result().json()["id"].endswith(entry.id)


def test_calls_are_logged_with_their_tools(start: Start, tools_bundle: Path, log: Path) -> None:
    server = start(tools_bundle, log=log)
    chat = {"model": "one", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    chat |= {"temperature": 1.5, "seed": 1, "max_tokens": 200}
    reply = server.client.post("/v1/chat/completions", json=chat).json()
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    other = {"tool_calls": [{"name": "clock", "arguments": {}}]}
    body = {"id": reply["id"], "correction": other}
    assert server.client.post(PATH, json=body).status_code == 200
    (entry,) = read_answer_log(log, server.runtime.manifest)
    arguments = json.loads(call["function"]["arguments"])
    assert json.loads(entry.answer) == {"tool_calls": [{"name": call["function"]["name"], "arguments": arguments}]}
    assert json.loads(entry.correction or "") == other
    assert [tool["function"]["name"] for tool in entry.tools or ()] == ["lamp", "clock"]
    assert 'edgetune_ttft_seconds_count{adapter="one"} 1.0' in server.client.get("/metrics").text


def test_calls_in_place_of_an_answer_that_could_call_nothing_are_refused(
    start: Start, tools_bundle: Path, log: Path
) -> None:
    server = start(tools_bundle, log=log)
    reply = server.client.post("/v1/chat/completions", json={"model": "one", "messages": ASK, "max_tokens": 4}).json()
    body = {"id": reply["id"], "correction": {"tool_calls": [{"name": "clock", "arguments": {}}]}}
    refused = server.client.post(PATH, json=body)
    assert refused.status_code == 400 and "calls tools, and the prompt had none" in refused.text


def test_what_may_call_no_tool_is_not_logged(start: Start, tools_bundle: Path, log: Path) -> None:
    server = start(tools_bundle, log=log)
    chat = {"model": "one", "messages": ASK, "tools": TOOLS, "tool_choice": "none", "max_tokens": 4}
    assert server.client.post("/v1/chat/completions", json=chat).status_code == 200
    assert read_answer_log(log, server.runtime.manifest) == []


def test_a_call_that_was_cut_off_is_logged_as_its_text(start: Start, tools_bundle: Path, log: Path) -> None:
    server = start(tools_bundle, log=log)
    chat = {"model": "one", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 4}
    assert server.client.post("/v1/chat/completions", json=chat).status_code == 200
    (entry,) = read_answer_log(log, server.runtime.manifest)
    expected = server.runtime.generate(ASK, adapter="one", tools=TOOLS, tool_choice="required", max_tokens=4)
    assert entry.answer == expected.text != ""


def test_an_answer_is_confirmed_or_corrected(server: Running, client: OpenAI, log: Path) -> None:
    text = server.runtime.generate(CHAT["messages"], adapter="command", max_tokens=4).text
    reply = client.chat.completions.create(**CHAT, n=2, stop=text[-2:])
    assert server.client.post(PATH, json={"id": reply.id}).json() == {"status": "ok"}
    corrected = {"id": reply.id, "index": 1, "correction": "light.on"}
    assert server.client.post(PATH, json=corrected).status_code == 200
    first, second = read_answer_log(log, server.runtime.manifest)
    assert (first.correction, second.correction) == (first.answer, "light.on")
    assert server.client.post(PATH, json={"id": second.id, "correction": "light.off"}).status_code == 200
    assert read_answer_log(log, server.runtime.manifest)[-1].correction == "light.off"
    for right in (["light.on", "é"], {"service": "light.on"}, []):
        assert server.client.post(PATH, json={**corrected, "correction": right}).status_code == 200
        *_, second = read_answer_log(log, server.runtime.manifest)
        assert json.loads(second.correction or "") == right
    assert server.client.post(PATH, json={"id": reply.id, "is_wrong": True}).json() == {"status": "ok"}
    _, first = read_answer_log(log, server.runtime.manifest)
    assert (first.correction, first.is_wrong) == (None, True)
    cut_off = client.chat.completions.create(**CHAT)
    assert "was cut off" in server.client.post(PATH, json={"id": cut_off.id}).json()["error"]


def test_an_adapters_own_unsure_answer_is_logged(start: Start, sure_bundle: Path, log: Path) -> None:
    server = start(sure_bundle, log=log)
    own = server.runtime.generate("set heat to warm", adapter="command", max_tokens=8)
    messages = [{"role": "user", "content": "set heat to warm"}]
    chat = {"model": "command", "messages": messages, "stop": own.text[-2:], "max_tokens": 24}
    chat |= {"min_confidence": 1 - 1e-9}

    def sent(**more: str) -> Response:
        return server.client.post("/v1/chat/completions", json={**chat, **more})

    other, question = sent(unsure="tone").json(), sent(ask="Which room?").json()
    assert sent(unsure="error").status_code == 422
    entries = read_answer_log(log, server.runtime.manifest)
    assert [(entry.adapter, entry.answer) for entry in entries] == [("command", own.text[:-2])] * 3
    assert server.client.post(PATH, json={"id": other["id"]}).status_code == 200
    refused = server.client.post(PATH, json={"id": question["id"]})
    assert (refused.status_code, "was cut off or a clarifying question" in refused.text) == (400, True)
    *_, first = read_answer_log(log, server.runtime.manifest)
    assert first.correction == other["choices"][0]["message"]["content"]


def test_what_calls_no_tool_is_no_correction_of_a_call(start: Start, tools_bundle: Path, log: Path) -> None:
    server = start(tools_bundle, log=log)
    chat = {"model": "one", "messages": ASK, "tools": TOOLS, "tool_choice": "required"}
    reply = server.client.post("/v1/chat/completions", json=chat | {"temperature": 1.5, "seed": 1, "max_tokens": 200})
    for correction in ({"name": "clock"}, {"tool_calls": "x"}, {"tool_calls": [{"name": "clok"}]}):
        body = {"id": reply.json()["id"], "correction": correction}
        assert server.client.post(PATH, json=body).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"id": "chatcmpl-unknown"}, 404, "no answer 'unknown'"),
        ({"id": "msg_unknown-1"}, 404, "no answer 'unknown-1'"),
        ({"correction": "on"}, 400, "id"),
        ({"id": "a", "correction": " "}, 400, "a text that is not empty"),
        ({"id": "a", "correction": 1}, 400, "correction is 1; give a text that is not empty, an object or a list"),
        ({"id": "a", "index": "b"}, 400, "a whole number"),
        ({"id": "a", "is_wrong": 1}, 400, "true or false"),
        (
            {"id": "a", "is_wrong": True, "correction": "on"},
            400,
            "is_wrong is true beside a correction; leave one",
        ),
        (
            {"id": "a", "corection": "on"},
            400,
            "corection is not a member of a correction; give id, index, corr",
        ),
    ],
)
def test_bad_corrections_are_refused(server: Running, body: dict[str, object], status: int, message: str) -> None:
    reply = server.client.post(PATH, json=body)
    assert (reply.status_code, message in reply.json()["error"]) == (status, True), reply.text


def test_a_server_without_a_log_says_how_to_get_one(start: Start) -> None:
    reply = start().client.post(PATH, json={"id": "a"})
    assert reply.status_code == 404
    assert "--log-answers" in reply.json()["error"]


def test_corrections_need_the_key(start: Start, log: Path) -> None:
    assert start(access=Access((KEY,)), log=log).client.post(PATH, json={"id": "a"}).status_code == 401
