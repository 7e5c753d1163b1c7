from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edgetune_runtime import IncompatibleError, Runtime, UsageError
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.events import Event
from edgetune_runtime.inference.answer import Stream
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.places import PATIENCE_S
from runtime.bundles import change_manifest, write_bundle
from runtime.serving.waiting import is_waiting, opening

PROMPT = "turn on the light"
MOST_S = 30
MODELS = (None, "whole", "other")


@pytest.fixture(params=["gguf", "onnx"])
def open_(request: pytest.FixtureRequest, merged_bundle: Path) -> Iterator[Callable[..., Runtime]]:
    """Opens the bundle with two merged adapters, in each engine."""
    with opening(merged_bundle, request.param) as make:
        yield make


def contexts_of(runtime: Runtime) -> list[int]:
    """How many contexts each model has that is open, the base first."""
    with loaded_bundle(runtime)._pools() as pools:
        return [len(pool.contexts) for pool in pools]


def test_calls_share_the_places_of_the_runtime_whatever_their_models(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=2)
    streams = [threads.submit(_begun, runtime, adapter).result(MOST_S) for adapter in MODELS[:2]]
    waiting = threads.submit(runtime.generate, PROMPT, adapter="other", max_tokens=2)
    assert is_waiting(waiting)
    assert runtime.generate(PROMPT, adapter="other", deadline_s=0.1).stop_reason == "deadline"
    streams[0].close()
    assert waiting.result(MOST_S).tokens
    streams[1].close()


def test_contexts_beside_the_first_of_each_model_are_as_many_as_the_limit_says(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=3)
    session = runtime.session()
    session.send(PROMPT, max_tokens=4)
    for adapter in MODELS:
        streams = [_begun(runtime, adapter) for _ in range(3)]
        assert contexts_of(runtime)[MODELS.index(adapter)] == 3
        for stream in streams:
            stream.close()
    # Those of the base and of the first merged model were freed.
    assert contexts_of(runtime) == [1, 1, 3]
    assert session.send("play", max_tokens=2).timings.reused_tokens > 16


def test_calls_wait_for_another_context_when_one_cannot_be_made_with_one_warning(
    merged_bundle: Path,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_engine: GgufEngine) -> GgufEngine:
        raise IncompatibleError("llama.cpp cannot make a context", "close other programs")

    monkeypatch.setattr(GgufEngine, "fork", refuse)
    with Runtime.open(merged_bundle, contexts=4, disk_mb=0) as runtime, caplog.at_level(logging.WARNING, "edgetune"):
        assert runtime.contexts == 4
        stream = _begun(runtime, None)
        waiting = [threads.submit(runtime.generate, PROMPT, max_tokens=2) for _ in range(4)]
        assert all(map(is_waiting, waiting))
        stream.close()
        assert all(answer.result(MOST_S).tokens for answer in waiting)
        assert runtime.contexts == 1
        assert [text for text in caplog.messages if "at most" in text] == [
            "from now on at most 1 calls run at the same time: llama.cpp cannot make a context; close other programs"
        ]


def test_merged_models_that_no_call_uses_are_closed_when_the_next_one_does_not_fit(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    events: list[Event] = []
    wide = open_(contexts=2, on_event=events.append)
    expected = {name: wide.generate(PROMPT, adapter=name, max_tokens=6).text for name in MODELS}
    assert len(set(expected.values())) == 3
    size_mb = max(model.bytes for model in loaded_bundle(wide)._merged._loaded.values()) / 1e6
    narrow = open_(contexts=2, merged_mb=1.5 * size_mb, on_event=events.append)
    events.clear()
    for name in ("whole", "other", "other", "whole", None):
        assert narrow.generate(PROMPT, adapter=name, max_tokens=6).text == expected[name]
    assert [event.name for event in events if event.kind == "loaded"] == ["whole", "other", "whole"]
    assert contexts_of(narrow) == [1, 1]
    # One that is in use stays.
    stream = threads.submit(_begun, narrow, "whole").result(MOST_S)
    assert narrow.generate(PROMPT, adapter="other", max_tokens=6).text == expected["other"]
    assert contexts_of(narrow) == [1, 1, 1]
    stream.close()


def test_a_session_continues_after_its_merged_model_was_evicted(open_: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = open_(contexts=1, merged_mb=0)
    with runtime.session("whole") as session, open_(contexts=1).session("whole") as alone:
        for message in (PROMPT, "play"):
            assert session.send(message, max_tokens=4).text == alone.send(message, max_tokens=4).text
            runtime.generate(PROMPT, adapter="other", max_tokens=1)
        session.save(tmp_path / "saved")
        with runtime.load_session(tmp_path / "saved") as again:
            assert again.send("stop", max_tokens=4).text == alone.send("stop", max_tokens=4).text


def test_memory_for_contexts_is_counted_for_the_type_of_keys_and_values(
    wide_gguf: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune_runtime.inference.opening.free_mb", lambda: 2000.0)
    bundle = write_bundle(tmp_path / "home", wide_gguf(128), {})
    with Runtime.open(bundle, disk_mb=0) as runtime:
        assert runtime.contexts == 4
    # In f16 a context would take 1.4 times what is free, in q8_0 three quarters of it.
    change_manifest(bundle, lambda raw: raw["base"].update(kv_values_per_token=int(1.4 * 2e9 / 256 / 2)))
    with pytest.raises(IncompatibleError, match="a context of 256 tokens takes"):
        Runtime.open(bundle, disk_mb=0)
    with Runtime.open(bundle, disk_mb=0, kv="q8_0") as runtime:
        assert runtime.contexts == 1
        assert runtime.generate(PROMPT, max_tokens=2).tokens


def test_a_call_waits_for_a_stream_that_other_threads_go_on_with(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=1)
    expected = runtime.generate(PROMPT, adapter="one", max_tokens=20).text
    # As in a web framework: each piece is read on some thread, of which this one read the first.
    stream = runtime.stream(PROMPT, adapter="one", max_tokens=20)
    pieces = [next(stream)]

    def read_on() -> str:
        time.sleep(PATIENCE_S / 4)
        for piece in stream:
            pieces.append(piece)
            threads.submit(time.sleep, 0).result(MOST_S)
        return "".join(pieces)

    reading = threads.submit(read_on)
    assert runtime.generate(PROMPT, max_tokens=2).tokens
    assert reading.result(MOST_S) == expected


@pytest.mark.usefixtures("short_patience")
def test_a_call_that_would_wait_for_its_own_threads_stream_is_an_error(open_: Callable[..., Runtime]) -> None:
    runtime = open_(contexts=1)
    stream = _begun(runtime, None)
    begin = time.monotonic()
    for call in (lambda: runtime.generate(PROMPT, adapter="whole"), runtime.clear_cache):
        with pytest.raises(UsageError, match="a stream is still open that nobody else reads"):
            call()
    assert time.monotonic() - begin < 4 * PATIENCE_S
    assert list(stream)
    assert runtime.generate(PROMPT, max_tokens=1).tokens


@pytest.mark.usefixtures("short_patience")
def test_a_stream_whose_thread_has_ended_holds_up_neither_calls_nor_closing(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=1)
    with ThreadPoolExecutor(1) as ending:
        stream = ending.submit(_begun, runtime, None).result(MOST_S)
    with pytest.raises(UsageError, match="a stream is still open"):
        runtime.generate(PROMPT)
    threads.submit(runtime.close).result(MOST_S)
    with pytest.raises(UsageError, match="closed"):
        stream.read()


def test_a_stream_is_not_closed_while_another_thread_reads_it(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    computing, looked = threading.Event(), threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "switched":
            computing.set()
            looked.wait(MOST_S)

    stream = open_(contexts=1, on_event=on_event).stream(PROMPT, adapter="one", max_tokens=4)
    reading = threads.submit(stream.read)
    assert computing.wait(MOST_S)
    for call in (stream.close, stream.read):
        with pytest.raises(UsageError, match="another thread is reading this stream; set its `cancel`"):
            call()
    looked.set()
    assert reading.result(MOST_S).tokens == 4


def test_a_stream_that_is_open_when_its_thread_closes_the_runtime_ends_with_an_error(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=2)
    streams = [_begun(runtime, adapter) for adapter in MODELS[:2]]
    runtime.close()
    for stream in streams:
        with pytest.raises(UsageError, match="closed"):
            threads.submit(stream.read).result(MOST_S)
    stop = threading.Event()
    stop.set()
    runtime = open_(contexts=1)
    stream = runtime.stream(PROMPT, max_tokens=50, cancel=stop)
    assert stream.read().stop_reason == "cancelled"


def _begun(runtime: Runtime, adapter: str | None) -> Stream:
    """A stream of which the first piece was read."""
    stream = runtime.stream(PROMPT, adapter=adapter, max_tokens=50, temperature=2.0, seed=1)
    next(stream)
    return stream
