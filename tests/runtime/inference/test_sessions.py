from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import IncompatibleError, NotFoundError, Runtime, UsageError, VerificationError
from edgetune_runtime.events import Event
from edgetune_runtime.inference.adapter_changes import chosen_adapter
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.jobs import PromptJob
from runtime.serving.waiting import is_waiting

ENGINES = ("gguf", "onnx")
MESSAGES = ("turn on the light", "play music", "and in the hall")


@pytest.fixture(params=ENGINES)
def runtime(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path]) -> Iterator[Runtime]:
    """The bundle of long prompts in each engine, without states on the disk."""
    with Runtime.open(prompted_of("llama"), engine=request.param, disk_mb=0) as opened:
        yield opened


def fresh_answer(runtime: Runtime, history: list[dict[str, str]], adapter: str | None) -> str:
    """What a runtime that has done nothing else answers to the last message of the user."""
    with Runtime.open(runtime.bundle, engine=runtime.engine, cache_mb=0, disk_mb=0) as fresh:
        return fresh.generate(history, adapter=adapter, max_tokens=4).text


def test_each_answer_is_that_of_a_fresh_runtime_to_the_whole_history(runtime: Runtime) -> None:
    with runtime.session("one") as session:
        for message, adapter in zip(MESSAGES, ("one", "two", "one"), strict=True):
            session.use(adapter)
            asked = [*session.history, {"role": "user", "content": message}]
            answer = session.send(message, max_tokens=4)
            assert answer.text == fresh_answer(runtime, asked, adapter)
            assert session.history == [*asked, {"role": "assistant", "content": answer.text}]


def test_going_back_finds_the_old_state(runtime: Runtime) -> None:
    with runtime.session("one") as session:
        first = session.send(MESSAGES[0], max_tokens=4).timings
        session.use("two")
        session.send(MESSAGES[1], max_tokens=4)
        session.use("one")
        back = session.send(MESSAGES[2], max_tokens=4).timings
    assert back.reused_tokens >= first.prompt_tokens
    assert back.carried_tokens == 0


def test_carrying_a_state_over_computes_the_message_alone_and_says_so(runtime: Runtime) -> None:
    with runtime.session("one") as session, runtime.session("one") as exact:
        for either in (session, exact):
            either.send(MESSAGES[0], max_tokens=4)
        before = loaded_bundle(runtime).pool("one")[0].saved(session._owner)
        session.use("two", carry="reuse")
        exact.use("two")
        answer, recomputed = session.send(MESSAGES[1], max_tokens=4, logprobs=0), exact.send(MESSAGES[1], max_tokens=4)
        carried = answer.timings.carried_tokens
        assert answer.timings.reused_tokens == carried > 16
        assert recomputed.timings.carried_tokens == 0
        # What the adapters so far have made stands, and the new ones act on all that follows.
        call = session._loaded.call([*session.history[:3]], "two", carried=None)
        assert before is not None
        context, _ = loaded_bundle(runtime).context()
        messages = [{"role": "system", "content": runtime.manifest.adapter("one").system}, *session.history[:3]]
        tokens = loaded_bundle(runtime).call(messages, "two").job.tokens
        spans = ((0, {"one": 1.0}), (carried, {"two": 0.5}))
        with context.hold():
            logits = context.run(PromptJob(tokens, spans)).logits
        assert answer.logprobs is not None
        assert answer.logprobs[0].token == logits.argmax()
        assert tokens[:carried] == list(before.tokens[:carried])
        assert call.job.tokens != tokens
        session.use("two")
        assert session.send(MESSAGES[2], max_tokens=2).timings.carried_tokens == 0


def test_a_carried_state_waits_for_an_adapter_that_is_replaced_and_is_dropped_with_one_that_is_removed(
    runtime: Runtime,
) -> None:
    loaded, new = loaded_bundle(runtime), chosen_adapter(runtime.manifest, runtime.bundle, "one")
    with runtime.session("one") as session, ThreadPoolExecutor(1) as threads:
        session.send(MESSAGES[0], max_tokens=4)
        session.use("two", carry="reuse")
        with loaded.replaced.replacing("one"):
            loaded.drop("one")
            answering = threads.submit(session.send, MESSAGES[1], max_tokens=4)
            assert is_waiting(answering)
            loaded.add(new)
        assert answering.result(timeout=60).timings.carried_tokens > 0
        runtime.remove_adapter("one")
        session.use("two", carry="reuse")
        asked = [*session.history, {"role": "user", "content": MESSAGES[2]}]
        answer = session.send(MESSAGES[2], max_tokens=4)
        assert (answer.timings.carried_tokens, answer.text) == (0, fresh_answer(runtime, asked, "two"))


def test_two_sessions_share_nothing_but_the_fixed_prompt(runtime: Runtime) -> None:
    secret = "warm light warm light warm light in the kitchen"
    with runtime.session("one") as mine, runtime.session("one") as other:
        mine.send(secret, max_tokens=3)
        fixed = loaded_bundle(runtime).call("?", "one").job.fixed
        assert other.send(secret, max_tokens=3).timings.reused_tokens == fixed
        assert runtime.generate(secret, adapter="one", max_tokens=3).timings.reused_tokens == fixed
        assert mine.send("play", max_tokens=3).timings.reused_tokens > fixed


def test_a_closed_session_leaves_no_state(runtime: Runtime) -> None:
    with runtime.session("one") as session:
        session.send(MESSAGES[0], max_tokens=3)
        owner = session._owner
        runtime.generate("play", adapter="two", max_tokens=1)
        assert loaded_bundle(runtime).pool("one")[0].saved(owner) is not None
    assert loaded_bundle(runtime).pool("one")[0].saved(owner) is None


@pytest.mark.parametrize("does", ["save", "close"])
def test_a_session_whose_context_another_call_takes_keeps_to_its_own_conversation(
    does: str, prompted_of: Callable[[str], Path], tmp_path: Path
) -> None:
    taken, ended = threading.Event(), threading.Event()

    def on_event(event: Event) -> None:
        if (event.kind, event.name) == ("switched", "two=0.5"):
            # The state of the session is in the cache, and its context is about to belong to the call.
            taken.set()
            ended.wait(0.3)

    with Runtime.open(prompted_of("llama"), contexts=1, disk_mb=0, on_event=on_event) as runtime:
        session, pool = runtime.session("one"), loaded_bundle(runtime).pool("one")[0]
        session.send(MESSAGES[0], max_tokens=4)
        own = pool.saved(session._owner)
        with ThreadPoolExecutor(1) as other:
            call = other.submit(runtime.generate, MESSAGES[1], adapter="two", max_tokens=8)
            assert taken.wait(30)
            session.save(tmp_path / "saved") if does == "save" else session.close()
            ended.set()
            call.result(30)
        if does == "close":
            assert pool.saved(session._owner) is None
            assert loaded_bundle(runtime).context()[0].tokens
        else:
            again = runtime.load_session(tmp_path / "saved")
            assert own is not None
            assert pool.saved(again._owner) == replace(own, ends=())


def test_a_saved_session_continues_in_another_process(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session("one") as session:
        # The last character is half a surrogate pair, as in a text that was cut there.
        session.send(f"{MESSAGES[0]} \u00e9 \ud83d", max_tokens=4)
        session.save(tmp_path / "saved")
        expected = session.send(MESSAGES[1], max_tokens=4)
    with (
        Runtime.open(runtime.bundle, engine=runtime.engine, disk_mb=0) as later,
        later.load_session(tmp_path / "saved") as again,
    ):
        answer = again.send(MESSAGES[1], max_tokens=4)
        assert (answer.text, again.history) == (expected.text, session.history)
        assert answer.timings.reused_tokens == expected.timings.reused_tokens > 0


def test_a_session_continues_in_the_other_engine_without_its_state(
    prompted_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = prompted_of("llama")
    with Runtime.open(bundle, engine="gguf", disk_mb=0) as runtime, runtime.session("two") as session:
        session.send(MESSAGES[0], max_tokens=4)
        session.save(tmp_path / "saved")
    with Runtime.open(bundle, engine="onnx", disk_mb=0) as runtime:
        again = runtime.load_session(tmp_path / "saved")
        told = f"dropped the state in {tmp_path / 'saved'}: it was made with other files or another engine"
        assert told in caplog.text
        assert again.history == session.history
        assert again.send(MESSAGES[1], max_tokens=4).timings.reused_tokens == 0


def test_a_loaded_session_keeps_carrying_states_to_the_next_adapter(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session("one") as session:
        session.send(MESSAGES[0], max_tokens=4)
        session.use("two", carry="reuse")
        session.save(tmp_path / "saved")
        expected = session.send(MESSAGES[1], max_tokens=4)
        again = runtime.load_session(tmp_path / "saved")
        assert again.send(MESSAGES[1], max_tokens=4).text == expected.text
        assert expected.timings.carried_tokens > 0


def test_answers_on_the_state_of_another_adapter_have_no_confidence(sure_bundle: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "min_confidence": 0.5}
    with Runtime.open(sure_bundle, engine="gguf", disk_mb=0) as runtime, runtime.session("command") as session:
        session.send(MESSAGES[0], **options)
        session.use("command", carry="reuse")
        session.send(MESSAGES[1], **options)
        session.use("tone", carry="reuse")
        with pytest.raises(UsageError, match="these answers have no confidence"):
            session.send(MESSAGES[2], **options)
        session.use("tone")
        session.send(MESSAGES[2], **options)


WRONG_SPANS: tuple[Any, ...] = (
    [],
    [[1, {"one": 1.0}]],
    [[0, {}], [0, {}]],
    [[0, {"one": "x"}]],
    [[0, {"one": None}]],
    [[0, {"one": float("nan")}]],
    [[0, {"one": float("inf")}]],
    [[0, 5]],
)


def test_files_that_are_no_sessions_are_refused(
    runtime: Runtime, prompted_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with runtime.session("one") as session:
        session.send(MESSAGES[0], max_tokens=2)
        session.save(tmp_path / "saved")
    with pytest.raises(NotFoundError, match="none"):
        runtime.load_session(tmp_path / "none")
    data = (tmp_path / "saved").read_bytes()
    for spoiled in (b"", data[:-1], data[:-1] + bytes([data[-1] ^ 1]), data.replace(b'"history"', b'"hostory"')):
        (tmp_path / "spoiled").write_bytes(spoiled)
        with pytest.raises(VerificationError, match="not a saved session"):
            runtime.load_session(tmp_path / "spoiled")
    head, _, state = data.partition(b"\n")
    for key, value in (
        ("history", 5),
        ("history", [5]),
        ("history", [{}]),
        ("adapter", 7),
        ("last", {"tokens": [1e400]}),
        *(("last", {"tokens": [5], "spans": spans, "system": None}) for spans in WRONG_SPANS),
        ("last", {"tokens": [5], "spans": [[0, {}]], "system": 7}),
    ):
        changed = json.loads(head)
        changed["about"]["conversation"][key] = value
        (tmp_path / "spoiled").write_bytes(json.dumps(changed).encode() + b"\n" + state)
        with pytest.raises(VerificationError, match="not a saved session"):
            runtime.load_session(tmp_path / "spoiled")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VerificationError, match="not a saved session"):
        runtime.load_session(tmp_path / "pipe")
    with Runtime.open(prompted_of("qwen2"), disk_mb=0) as other, pytest.raises(IncompatibleError, match="another base"):
        other.load_session(tmp_path / "saved")


def test_an_answer_cut_short_is_not_in_the_history(runtime: Runtime) -> None:
    cancel = threading.Event()
    cancel.set()
    with runtime.session("one") as session:
        assert session.send(MESSAGES[0], cancel=cancel).stop_reason == "cancelled"
        assert session.history == []
        stream = session.stream(MESSAGES[0], max_tokens=8)
        next(stream)
        stream.close()
        assert session.history == []
        assert session.send(MESSAGES[0], max_tokens=2).stop_reason in ("length", "end")
        assert len(session.history) == 2


def test_a_session_answers_one_message_at_a_time(runtime: Runtime) -> None:
    with runtime.session("one") as session:
        stream = session.stream(MESSAGES[0], max_tokens=2)
        with pytest.raises(UsageError, match="a stream of this session is still open; read it to its end"):
            session.send(MESSAGES[1], max_tokens=2)
        stream.read()
        session.send(MESSAGES[1], max_tokens=2)
        assert [message["content"] for message in session.history[::2]] == [*MESSAGES[:2]]


def test_closing_a_session_ends_its_stream_and_hides_no_error_of_the_app(runtime: Runtime) -> None:
    with pytest.raises(KeyError), runtime.session("one") as session:
        stream = session.stream(MESSAGES[0], max_tokens=8)
        next(stream)
        raise KeyError
    with pytest.raises(UsageError, match="the stream was closed before its end"):
        stream.read()


def test_a_refused_switch_leaves_the_session_unchanged(runtime: Runtime) -> None:
    with runtime.session("one") as session:
        with pytest.raises(NotFoundError, match="three"):
            session.use("three")
        with pytest.raises(UsageError, match="carry"):
            session.use("two", carry="keep")
        assert session.adapter == "one"
        with pytest.raises(NotFoundError, match="three"):
            runtime.session("three")
