"""The confidence of answers in both APIs, and what becomes of unsure ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import DeferTo, Runtime, ToolCall, UsageError
from edgetune_runtime.inference.deferring import DeferError, ask
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.limits import no_limits
from edgetune_runtime.tools.definitions import tool_set
from openai import OpenAI, UnprocessableEntityError
from ports import free_port, replying
from runtime.bundles import change_manifest
from runtime.server.conftest import Running, Start, started
from runtime.server.test_health import figures

PROMPT = "set heat to warm"
UNSURE = 1 - 1e-9
QUESTION = "Which room do you mean?"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def sure(sure_bundle: Path) -> Iterator[Running]:
    """A server of a bundle whose answers have a confidence."""
    with started(sure_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def stop(sure_bundle: Path) -> str:
    """A text that ends the answer of `command`."""
    with Runtime.open(sure_bundle, disk_mb=0) as runtime:
        return runtime.generate(PROMPT, adapter="command", max_tokens=8).text[-2:]


def body_of(stop: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - of a request
    return {"model": "command", "messages": MESSAGES, "stop": stop, "max_tokens": 24, **more}


def test_openai_answers_have_it_in_a_field_and_a_header(sure: Running, stop: str) -> None:
    own = sure.runtime.generate(PROMPT, adapter="command", stop=stop, max_tokens=24)
    reply = sure.client.post("/v1/chat/completions", json=body_of(stop))
    (choice,) = reply.json()["choices"]
    assert choice["confidence"] == pytest.approx(own.confidence, abs=1e-4)
    assert (choice["is_unsure"], choice["instead"]) == (False, None)
    assert float(reply.headers["X-Edgetune-Confidence"]) == pytest.approx(own.confidence, abs=1e-4)
    assert "X-Edgetune-Unsure" not in reply.headers
    marked = sure.client.post("/v1/chat/completions", json=body_of(stop, min_confidence=UNSURE))
    assert marked.json()["choices"][0]["is_unsure"]
    assert marked.headers["X-Edgetune-Unsure"] == "mark"
    assert marked.json()["choices"][0]["message"] == choice["message"]
    base = sure.client.post("/v1/chat/completions", json=body_of(stop, model="home"))
    assert "confidence" not in base.json()["choices"][0]
    assert "X-Edgetune-Confidence" not in base.headers


def test_a_client_of_openai_gets_a_question_back(sure: Running, stop: str) -> None:
    options: dict[str, Any] = {"min_confidence": UNSURE, "ask": QUESTION}
    with OpenAI(base_url=f"{sure.url}/v1", api_key="-", max_retries=0) as client:
        chat: dict[str, Any] = {"model": "command", "messages": MESSAGES, "stop": stop, "extra_body": options}
        answer = client.chat.completions.create(**chat)
        assert answer.choices[0].message.content == QUESTION
        assert answer.choices[0].model_extra is not None
        assert answer.choices[0].model_extra["instead"] == "ask"
        parts = list(client.chat.completions.create(**chat, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == QUESTION
        assert parts[-1].choices[0].model_extra is not None
        assert parts[-1].choices[0].model_extra["is_unsure"]
        response = client.responses.create(
            model="command", input=PROMPT, max_output_tokens=24, extra_body={"stop": stop, **options}
        )
        assert response.output_text == QUESTION
        assert response.model_extra is not None
        assert response.model_extra["instead"] == "ask"
        with pytest.raises(UnprocessableEntityError, match="the confidence of the answer is"):
            client.chat.completions.create(
                model="command", messages=MESSAGES, stop=stop, extra_body={"min_confidence": 1, "unsure": "error"}
            )


def test_a_client_of_ollama_gives_them_as_options(sure: Running, stop: str) -> None:
    options = {"stop": [stop], "num_predict": 24, "min_confidence": UNSURE, "unsure": "base"}
    reply = sure.client.post(
        "/api/chat", json={"model": "command", "messages": MESSAGES, "options": options, "stream": False}
    )
    assert (reply.json()["is_unsure"], reply.json()["instead"]) == (True, "base")
    assert reply.headers["X-Edgetune-Unsure"] == "base"
    assert reply.json()["message"]["content"] == sure.runtime.generate(PROMPT, stop=stop, max_tokens=24).text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"min_confidence": 2}, "min_confidence is 2"),
        ({"min_confidence": "high"}, "min_confidence is"),
        ({"min_confidence": 0.5, "unsure": "defer"}, "there is no address to defer to"),
        ({"min_confidence": 0.5, "ask": 3}, "ask is 3"),
        ({"min_confidence": 0.5, "unsure": "command"}, "unsure is 'command', which is the unsure adapter itself"),
        ({"unsure": "error"}, "unsure is 'error', but there is no min_confidence for this call; give min_confidence"),
        ({"min_confidence": 0.5, "model": "home"}, "have no confidence"),
    ],
)
def test_wrong_values_are_refused(more: dict[str, Any], message: str, sure: Running, stop: str) -> None:
    reply = sure.client.post("/v1/chat/completions", json=body_of(stop, **more))
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_metrics_have_a_histogram(sure_bundle: Path, start: Start, stop: str) -> None:
    server, refused = start(sure_bundle), {"min_confidence": 1, "unsure": "error"}
    for more in ({}, {"min_confidence": UNSURE}, {"max_tokens": 1}, refused):
        server.client.post("/v1/chat/completions", json=body_of(stop, **more))
    found = figures(server)
    assert found["edgetune_confidence_count adapter=command"] == 3
    assert found["edgetune_unsure_answers_total adapter=command"] == 2


def test_a_bigger_model_answers(sure_bundle: Path, sure_home: Path, stop: str, start: Start) -> None:
    change_manifest(sure_home, lambda raw: raw["adapters"]["tone"].update(output={"choices": ["the lamp", "the heat"]}))
    server = start(sure_home)
    answer = unsure_answer(sure_bundle, stop, DeferTo(f"{server.url}/v1", "tone"))
    system = server.runtime.manifest.adapter("command").system
    messages = [{"role": "system", "content": system}, *MESSAGES]
    assert answer.text == server.runtime.generate(messages, adapter="tone", max_tokens=1024).text
    assert (answer.is_unsure, answer.instead) == (True, "defer")


def chat(message: dict[str, Any]) -> tuple[int, bytes]:
    """A reply with this answer."""
    return 200, json.dumps({"choices": [{"message": message}]}).encode()


def refusal(name: str, value: object) -> tuple[int, bytes]:
    """A reply that refuses a member as OpenAI does."""
    message = f"Unsupported value: '{name}' does not support {value} with this model."
    return 400, json.dumps({"error": {"message": message, "param": name}}).encode()


REPLY = chat({"role": "assistant", "content": "the lamp is on"})


def unsure_answer(bundle: Path, stop: str | list[str], to: DeferTo, **options: Any) -> Any:  # noqa: ANN401 - an Answer
    with Runtime.open(bundle, disk_mb=0, defer_to=to) as runtime:
        own = {"adapter": "command", "stop": stop, "max_tokens": 24, "min_confidence": UNSURE, "unsure": "defer"}
        return runtime.generate(PROMPT, **{**own, **options})


def test_the_request_has_the_key_and_the_conversation(sure_bundle: Path, stop: str) -> None:
    with replying(REPLY) as (url, got):
        answer = unsure_answer(sure_bundle, stop, DeferTo(f"{url}/v1", "big", key="secret"))
    assert (answer.text, answer.instead) == ("the lamp is on", "defer")
    (request,) = got
    assert (request.path, request.headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    body = json.loads(request.body)
    assert (body["model"], [message["role"] for message in body["messages"]]) == ("big", ["system", "user"])
    assert "secret" not in repr(DeferTo(url, "big", key="secret"))


def test_a_model_that_refuses_a_temperature_is_asked_without(sure_bundle: Path, stop: str) -> None:
    with replying(refusal("temperature", 0), REPLY) as (url, got):
        answer = unsure_answer(sure_bundle, stop, DeferTo(url, "thinking"))
    assert (answer.text, answer.instead) == ("the lamp is on", "defer")
    assert [json.loads(request.body).get("temperature") for request in got] == [0, None]


def test_its_answer_ends_at_a_stop_text_and_has_no_more_tokens_than_asked_for(
    sure_bundle: Path, sure: Running, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    to_say = "the lamp is on, as it was" + " before" * 50
    with replying(chat({"content": to_say})) as (url, got):
        long = unsure_answer(sure_bundle, [stop], DeferTo(url, "big"))
        short = unsure_answer(sure_bundle, [stop, "was", ","], DeferTo(url, "big"))
    assert (long.is_unsure, long.instead) == (True, None)
    assert "'big' answered with more than 24 tokens; give a larger max_tokens" in caplog.text
    assert (short.text, short.instead) == ("the lamp is on", "defer")
    with loaded_bundle(sure.runtime).base.tokenizer() as tokenizer:
        assert short.tokens == len(tokenizer.tokenize(short.text, continues=True))
    # A model that thinks would stop within its thought.
    assert not {"stop", "max_tokens"} & json.loads(got[0].body).keys()


def test_the_reason_of_another_refusal_is_logged(
    sure_bundle: Path, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with replying(refusal("model", "none")) as (url, got):
        answer = unsure_answer(sure_bundle, stop, DeferTo(url, "none"))
    assert (answer.instead, len(got)) == (None, 1)
    assert "failed: HTTP 400: Unsupported value: 'model' does not support none with this model" in caplog.text


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"broken"),
        (302, b""),
        (401, b"{}"),
        (200, b"<html>"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"content": 7}}]}'),
        (200, b'{"choices": [{"message": {"tool_calls": [{"function": {"name": "a", "arguments": "1"}}]}}]}'),
        (200, b"[" * 100_000),
        (500, b"[" * 100_000),
        (200, b'{"choices": [{"message": {"content": "the lamp"}, "finish_reason": "length"}]}'),
        (200, b'{"choices": [{"message": {"content": "Which lamp?"}, "is_unsure": true, "instead": "ask"}]}'),
        (200, b'{"choices": [{"message": {"content": " <think>a lamp</think>\\n"}}]}'),
        (200, b" " * (1 << 21)),
    ],
)
def test_one_that_answers_rubbish_leaves_the_marked_answer(
    status: int, body: bytes, sure_bundle: Path, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with replying((status, body)) as (url, got):
        answer = unsure_answer(sure_bundle, stop, DeferTo(url, "big"))
    assert (answer.is_unsure, answer.instead, len(got)) == (True, None, 1)
    assert "kept an unsure answer: 'big' at http" in caplog.text


def test_one_that_is_down_leaves_the_marked_answer(
    sure_bundle: Path, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = unsure_answer(sure_bundle, stop, DeferTo(f"http://127.0.0.1:{free_port()}/v1", "big"))
    assert (answer.is_unsure, answer.instead) == (True, None)
    assert "Connection refused" in caplog.text


def test_one_that_is_slow_is_waited_for_no_longer_than_the_limit(
    sure_bundle: Path, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        begin = time.monotonic()
        answer = unsure_answer(sure_bundle, stop, DeferTo(url, "big", timeout_s=0.3))
        assert (answer.is_unsure, answer.instead) == (True, None)
        assert "did not answer within 0.3 s" in caplog.text
        cancel = threading.Event()
        threading.Timer(1, cancel.set).start()
        stopped = unsure_answer(sure_bundle, stop, DeferTo(url, "big", timeout_s=60), cancel=cancel)
        assert stopped.stop_reason == "cancelled"
        assert time.monotonic() - begin < 20


def test_a_deadline_meanwhile_leaves_the_whole_answer(sure_bundle: Path, stop: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        answer = unsure_answer(sure_bundle, stop, DeferTo(url, "big"), deadline_s=3)
    assert (answer.is_unsure, answer.instead, answer.stop_reason) == (True, None, "stop")
    assert answer.confidence is not None


def test_other_requests_run_meanwhile(sure_bundle: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        server = start(sure_bundle, contexts=1, defer_to=DeferTo(url, "big", timeout_s=5))
        stop = server.runtime.generate(PROMPT, adapter="command", max_tokens=8).text[-2:]
        body, ended = body_of(stop, min_confidence=UNSURE, unsure="defer"), list[str]()

        def ask_for(name: str, body: dict[str, Any]) -> None:
            assert server.client.post("/v1/chat/completions", json=body).status_code == 200
            ended.append(name)

        waiting = threading.Thread(target=ask_for, args=("deferred", body))
        waiting.start()
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            ask_for("other", body_of(stop))
        waiting.join()
    assert ended == ["other", "deferred"]


def test_a_label_must_be_one_of_those_that_it_was_told(sure_bundle: Path) -> None:
    with Runtime.open(sure_bundle) as runtime:
        labels = runtime.manifest.adapter("tone").labels
        end = runtime.generate(PROMPT, adapter="tone", max_tokens=8).text[-2:]
    for text, instead in ((f" {labels[1]}\n", "defer"), ("Sure! Here is a poem.", None)):
        with replying(chat({"content": text})) as (url, got):
            answer = unsure_answer(sure_bundle, end, DeferTo(url, "big"), adapter="tone")
        assert (answer.instead, answer.text == labels[1]) == (instead, instead is not None)
        system = json.loads(got[0].body)["messages"][0]["content"]
        assert f"one of these texts, and nothing else: {'; '.join(labels)}" in system


def test_its_answer_must_fit_the_output_constraint(sure_home: Path) -> None:
    schema = {"type": "object", "properties": {"room": {"enum": ["hall", "loft"]}}, "required": ["room"]}
    output = {"schema": schema, "spacing": "compact"}
    change_manifest(sure_home, lambda raw: raw["adapters"]["command"].update(output=output))

    def asked(content: str) -> Any:  # noqa: ANN401 - an Answer
        with replying(chat({"content": content})) as (url, got):
            answer = unsure_answer(sure_home, "never", DeferTo(url, "big"))
        assert json.loads(got[0].body)["response_format"]["json_schema"]["schema"] == schema
        return answer

    good = asked('{"room": "loft"}')
    assert (good.instead, good.parsed) == ("defer", {"room": "loft"})
    bad = asked('{"room": "attic"}')
    assert bad.instead is None
    assert bad.parsed["room"] in ("hall", "loft")


LAMP = {
    "type": "object",
    "properties": {"room": {"enum": ["hall", "loft"]}, "on": {"type": "boolean"}},
    "required": ["room"],
    "additionalProperties": False,
}


def deferred(message: dict[str, Any], choice: str) -> tuple[str, tuple[ToolCall, ...]]:
    """What a bigger model that answers so says and calls."""
    with replying(chat(message)) as (url, _):
        tools = tool_set([{"name": "lamp", "parameters": LAMP}], choice)
        return ask(DeferTo(url, "big"), MESSAGES, tools, None, no_limits)


def calling(arguments: dict[str, Any], name: str = "lamp") -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}


def test_its_calls_must_fit_the_tools() -> None:
    _, (call,) = deferred(calling({"on": True, "room": "hall"}), "required")
    assert (call.name, list(call.arguments.items())) == ("lamp", [("room", "hall"), ("on", True)])
    for message, choice, problem in (
        (calling({"room": "attic"}), "auto", "called 'lamp' with .*attic.*, which its schema does not allow"),
        (calling({"room": "hall", "x": 1}), "auto", "which its schema does not allow"),
        (calling({}, "lmap"), "auto", "called 'lmap', which is not one of the tools"),
        (calling({"room": "hall"}), "none", "called 'lamp', which is not one of the tools"),
        ({"content": "Sure."}, "required", "called no tool, and tool_choice is 'required'"),
        ({"content": "Sure."}, "lamp", "called no tool, and tool_choice is 'lamp'"),
        ({"content": ""}, "auto", "gave an empty answer"),
        ({"content": "\ud800"}, "auto", "sent no chat completion"),
        (calling({"room": "\ud800"}), "auto", "sent no chat completion"),
    ):
        with pytest.raises(DeferError, match=problem):
            deferred(message, choice)
    assert deferred({"content": "Sure."}, "auto") == ("Sure.", ())
    level, color = {"type": "integer"}, {"type": "object", "properties": {"r": {"type": "integer"}, "g": {}}}
    schema = {"type": "object", "properties": {"level": level, "colors": {"type": "array", "items": color}}}
    tool = tool_set([{"name": "lamp", "parameters": schema}])
    assert tool is not None
    written = tool.tools[0].ordered({"colors": [{"g": 1.5, "r": 2.0}], "level": 1.0})
    assert json.dumps(written) == '{"level": 1, "colors": [{"r": 2, "g": 1.5}]}'
    odd = tool_set([{"name": "lamp", "parameters": {"type": "object", "properties": {"a": {"properties": 7}}}}])
    assert odd is not None
    assert odd.tools[0].ordered({"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("values", "message"), [(("ftp://a", "b"), "give one such as"), (("http://a", "b", 0), "timeout_s is 0")]
)
def test_an_address_is_checked(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeferTo(*values)
