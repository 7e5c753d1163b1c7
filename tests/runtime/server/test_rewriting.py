from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.server import rewriting
from edgetune_runtime.server.answering import Answering, Serving
from edgetune_runtime.server.rewriting import Rewriter
from edgetune_runtime.server.settings import Access, ServerLimits
from openai import OpenAI
from runtime.server.conftest import Running, started
from runtime.server.test_serve_command import serving
from runtime.stores import switch_to
from waiting import wait_for

MODULE = """
import threading
from dataclasses import dataclass

@dataclass
class Reply:
    text: str = ""
    calls: tuple = ()

@dataclass
class Short:
    prompt: str
    adapter: str = "command"
    schema: dict | None = None
    has_calls: bool = False

    def reply(self, answer):
        if self.prompt.startswith("worse"):
            raise KeyError("no such lamp")
        if self.prompt.startswith("number"):
            return Reply(5)
        if self.prompt.startswith("set"):
            return Reply(calls=({"name": "lamp", "arguments": {"colors": {1}}},))
        call = {"name": "lamp", "arguments": {"answer": answer}}
        return Reply(calls=(call,)) if self.has_calls else Reply("said: " + answer)

class Slow(Short):
    began, released = threading.Event(), threading.Event()

    def reply(self, answer):
        self.began.set()
        assert self.released.wait(20)
        return Reply("at last")

class Hanging:
    released = threading.Event()

def rewrite(messages, tools):
    said = messages[-1]["content"]
    if said == "hang":
        assert Hanging.released.wait(60)
    if said == "exit":
        raise SystemExit("no such room")
    if said == "fail":
        raise ValueError("no such room")
    if said == "nothing":
        return None
    if said == "slow":
        return Slow(said)
    if tools:
        return Short("light", schema={"enum": ["on", "off"]}, has_calls=True)
    return Short(said + " in the hall")
"""
TOOLS: list[Any] = [{"type": "function", "function": {"name": "lamp"}}]


def said(text: str) -> list[Any]:
    return [{"role": "system", "content": "All devices. " * 50}, {"role": "user", "content": text}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module `shortened` of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "shortened.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("shortened", None)


@pytest.fixture
def server(bundle: Path, folder: Path) -> Iterator[Running]:
    rewriters = [Rewriter.load("short=shortened:rewrite", folder)]
    with started(bundle, rewriters=rewriters, contexts=1) as running:
        yield running


def test_a_chat_is_answered_by_the_adapter_with_the_rewritten_prompt(server: Running, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="short", messages=said("play music"), max_tokens=8)
    own = server.runtime.generate("play music in the hall", adapter="command", max_tokens=8)
    assert answer.choices[0].message.content == f"said: {own.text}"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == own.timings.prompt_tokens


def test_a_question_in_place_of_an_unsure_answer_is_sent_as_it_is(sure_bundle: Path, folder: Path) -> None:
    rewriters = [Rewriter.load("short=shortened:rewrite", folder)]
    with started(sure_bundle, rewriters=rewriters) as running:
        own = running.runtime.generate("play music in the hall", adapter="command", max_tokens=8)
        body = {"model": "short", "messages": said("play music"), "stop": own.text[-2:], "max_tokens": 24}
        unsure = {"min_confidence": 1 - 1e-9, "ask": "Which room?"}
        replies = [running.client.post("/v1/chat/completions", json={**body, **more}) for more in ({}, unsure)]
    sent = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert sent[0].startswith("said: ") and sent[1] == "Which room?"


def test_calls_of_the_reply_are_tool_calls_in_both_apis_streamed_and_not(server: Running, client: OpenAI) -> None:
    whole = client.chat.completions.create(model="short", messages=said("light"), tools=TOOLS).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    function = getattr(whole.message.tool_calls[0], "function")  # noqa: B009 - one of the client's many types
    assert function.name == "lamp"
    assert json.loads(function.arguments)["answer"] in {'"on"', '"off"'}
    arguments = json.loads(function.arguments)

    with ollama.Client(server.url) as other:
        parts = list(other.chat("short:latest", said("light"), tools=TOOLS, stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [("lamp", arguments)]
    assert not "".join(part.message.content or "" for part in parts)
    assert parts[-1].done


def test_the_model_is_listed_with_the_base_as_its_parent(server: Running, bundle: Path) -> None:
    listed = {model["id"]: model["parent"] for model in server.client.get("/v1/models").json()["data"]}
    with Runtime.open(bundle) as runtime:
        assert listed["short"] == runtime.manifest.name
    assert "short:latest" in {model["name"] for model in server.client.get("/api/tags").json()["models"]}
    assert server.client.post("/api/show", json={"model": "short"}).status_code == 200
    assert "short" in {model["name"] for model in server.client.get("/edgetune/bundle").json()["models"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/chat", {"messages": said("fail")}, 400, "model 'short' cannot read this chat: ValueError: no such room"),
        ("/api/chat", {"messages": said("exit")}, 400, "cannot read this chat: SystemExit: no such room"),
        ("/api/chat", {"messages": said("nothing")}, 400, "model 'short' cannot read this chat: AttributeError"),
        ("/api/chat", {"messages": said("worse")}, 400, "model 'short' cannot make a reply of the answer: KeyError"),
        ("/api/chat", {"messages": said("number")}, 400, "cannot make a reply of the answer: TypeError: 5 is not text"),
        ("/v1/chat/completions", {"messages": said("set")}, 400, "Object of type set is not JSON serializable"),
        ("/v1/completions", {"prompt": "light"}, 400, "model 'short' answers chats without a prompt of their own"),
        ("/api/chat", {"messages": said("a"), "format": "json"}, 400, "chats without a format of their own"),
    ],
)
def test_a_chat_or_an_answer_that_cannot_be_rewritten_is_refused(
    path: str, body: dict[str, Any], status: int, text: str, server: Running
) -> None:
    reply = server.client.post(path, json={"model": "short", **body})
    assert reply.status_code == status
    assert text in reply.text
    assert server.client.post("/api/chat", json={"model": "short", "messages": said("on")}).status_code == 200


def test_the_server_answers_others_while_a_reply_is_made(server: Running, threads: ThreadPoolExecutor) -> None:
    slow = sys.modules["shortened"].Slow
    body = {"model": "short", "messages": said("slow"), "stream": False}
    sent = threads.submit(server.client.post, "/api/chat", json=body)
    try:
        assert slow.began.wait(20)
        assert server.client.get("/healthz", timeout=5).status_code == 200
    finally:
        slow.released.set()
    assert sent.result(timeout=20).json()["message"]["content"] == "at last"


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewriter that is loaded from now on runs few calls at once."""
    monkeypatch.setattr(rewriting, "_MAX_CALLS", 4)


def test_calls_that_never_end_stop_no_other_model(few_calls: None, server: Running) -> None:
    body = {"model": "short", "messages": said("hang")}
    replies: list[httpx.Response] = []

    def is_refused() -> bool:
        with suppress(httpx.ReadTimeout):
            replies.append(server.client.post("/api/chat", json=body, timeout=httpx.Timeout(10, read=0.1)))
        return bool(replies)

    try:
        wait_for(is_refused)
        assert (replies[0].status_code, replies[0].headers["retry-after"]) == (503, "1")
        assert "model 'short' has 4 calls that have not ended" in replies[0].text
        chat = {"model": "command", "messages": said("play")[1:], "options": {"num_predict": 2}}
        assert server.client.post("/api/chat", json=chat, timeout=10).status_code == 200
    finally:
        sys.modules["shortened"].Hanging.released.set()
    body["messages"] = said("on")
    wait_for(lambda: server.client.post("/api/chat", json=body).status_code == 200)


def test_a_call_ends_with_the_time_of_its_request(bundle: Path, folder: Path) -> None:
    rewriters, limits = [Rewriter.load("short=shortened:rewrite", folder)], ServerLimits(request_s=0.5, grace_s=5)
    with started(bundle, limits=limits, rewriters=rewriters, contexts=1) as server:
        try:
            for text, action in (("hang", "read this chat"), ("slow", "make a reply of the answer")):
                chat = {"model": "short", "messages": said(text), "options": {"num_predict": 1}, "stream": False}
                reply = server.client.post("/api/chat", json=chat, timeout=10)
                message = f"model 'short' did not {action} in the time of the request; make its function faster"
                assert reply.status_code == 400 and message in reply.text
        finally:
            sys.modules["shortened"].Hanging.released.set()
            sys.modules["shortened"].Slow.released.set()


def test_calls_that_never_end_do_not_keep_the_command_from_stopping(
    bundle: Path, folder: Path, threads: ThreadPoolExecutor
) -> None:
    rewrite = ["--rewrite", "short=shortened:rewrite", "--app-dir", folder]
    with serving(bundle, *rewrite, "--contexts", 1, "--max-grace-s", 0) as (process, url):

        def has_running(requests: int) -> bool:
            return f"edgetune_requests_running {requests}.0" in httpx.get(f"{url}/metrics").text

        with ollama.Client(url) as client:
            reply = client.chat("short", said("play"), options={"num_predict": 4})
        assert (reply.message.content or "").startswith("said: ")
        chat = {"model": "short", "messages": said("hang")}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/api/chat", json=chat, timeout=httpx.Timeout(10, read=0.5))
        # The call of a client that has left runs on, and counts no more.
        wait_for(lambda: has_running(0))
        sent = threads.submit(httpx.post, f"{url}/api/chat", json=chat, timeout=30)
        wait_for(lambda: has_running(1))
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=15)[1] == ""
    assert process.returncode == 0
    assert sent.result().status_code == 503 and "the server is stopping" in sent.result().text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("home", "'home' is not NAME=MODULE:FUNCTION"),
        ("home=shortened", "is not NAME=MODULE:FUNCTION"),
        ("home=absent:rewrite", "No module named 'absent'"),
        ("home=shortened:other", "has no attribute 'other'"),
        ("home=shortened:dataclass.x", "cannot be loaded"),
        ("home=failing:rewrite", "'home=failing:rewrite' cannot be loaded: SystemExit: 3; check the name"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(given: str, text: str, folder: Path) -> None:
    (folder / "failing.py").write_text("raise SystemExit(3)")
    with pytest.raises(UsageError, match=text):
        Rewriter.load(given, folder)


def test_the_name_of_another_model_is_refused(bundle: Path, folder: Path) -> None:
    for names in (["command"], ["home"], ["short", "short"]):
        rewriters = [Rewriter.load(f"{name}=shortened:rewrite", folder) for name in names]
        with Runtime.open(bundle) as runtime, pytest.raises(UsageError, match="has the name of another model"):
            Answering(AsyncRuntime(runtime), Serving(Access(), ServerLimits(), False, rewriters, None))


def test_a_new_adapter_with_the_name_of_a_rewriter_is_hidden_by_it(
    bundle: Path, fewer: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = tmp_path / "device"
    rewriters = [Rewriter.load("tone=shortened:rewrite", folder)]
    path = switch_to(prefix, "a" * 16, fewer)
    with started(path, rewriters=rewriters, contexts=1) as server:
        for version, has_tone in (("b", True), ("c", False), ("d", True)):
            caplog.clear()
            switch_to(prefix, version * 16, bundle if has_tone else fewer)
            wait_for(lambda has=has_tone: ("tone" in server.runtime.adapters) == has)
            wait_for(lambda has=has_tone: ("a --rewrite has its name" in caplog.text) == has)
            listed = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
            assert sorted(listed) == sorted(["home", "command", "whole", "tone"])
            body = {"model": "tone", "messages": said("play"), "max_tokens": 4}
            reply = server.client.post("/v1/chat/completions", json=body).json()
            assert reply["choices"][0]["message"]["content"].startswith("said: ")
