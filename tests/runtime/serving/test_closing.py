from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.decoding import output
from edgetune_runtime.events import Event
from edgetune_runtime.inference.answer import Stream
from edgetune_runtime.inference.measuring import loaded_bundle
from runtime.serving.waiting import is_waiting, opening
from waiting import wait_for

PROMPT = "turn on the light"
MOST_S = 30


@pytest.fixture(params=["gguf", "onnx"])
def open_(request: pytest.FixtureRequest, both_of: Callable[[str], Path]) -> Iterator[Callable[..., Runtime]]:
    """Opens the bundle with a merged adapter, in each engine."""
    with opening(both_of("llama"), request.param) as make:
        yield make


def close_meanwhile(runtime: Runtime, threads: ThreadPoolExecutor, go: threading.Event, call: Future[Any]) -> None:
    """Close while `call`, which goes on at `go`, is not done: closing waits for it, and it is refused."""
    closing = threads.submit(runtime.close)
    assert is_waiting(closing)
    go.set()
    closing.result(MOST_S)
    with pytest.raises(UsageError, match="the runtime is closed"):
        call.result(MOST_S)


def test_a_text_that_is_tokenized_stops_no_other_call(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=2)
    pool, _ = loaded_bundle(runtime).pool(None)
    with pool.tokenizer():
        for choices in (None, ["red", "green"]):
            answer = threads.submit(runtime.generate, PROMPT, adapter="command", max_tokens=2, choices=choices)
            assert answer.result(MOST_S).tokens


def test_closing_waits_for_calls_and_for_texts_that_are_tokenized(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    runtime = open_(contexts=2)
    expected = runtime.generate(PROMPT, max_tokens=8).text
    begun, go = threading.Semaphore(0), threading.Event()

    def read(stream: Stream) -> str:
        pieces = [next(stream)]
        begun.release()
        go.wait(MOST_S)
        return "".join([*pieces, *stream])

    def tokenize() -> list[int]:
        with loaded_bundle(runtime).pool(None)[0].tokenizer() as tokenizer:
            begun.release()
            go.wait(MOST_S)
            return tokenizer.tokenize(PROMPT)

    # Two contexts: the second one is a fork, which is closed first.
    running = [threads.submit(read, runtime.stream(PROMPT, max_tokens=8)) for _ in range(2)]
    tokenizing = threads.submit(tokenize)
    for _ in range(3):
        assert begun.acquire(timeout=MOST_S)
    waiting = threads.submit(runtime.generate, PROMPT)
    closing = threads.submit(runtime.close)
    assert is_waiting(closing)
    with pytest.raises(UsageError, match="the runtime is closed"):
        waiting.result(MOST_S)
    go.set()
    closing.result(MOST_S)
    assert [future.result(MOST_S) for future in running] == [expected, expected]
    assert tokenizing.result(MOST_S)


def test_closing_waits_for_a_context_that_is_being_made(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_(contexts=2)
    context, _ = loaded_bundle(runtime).context()
    fork, begun, go = context.engine.fork, threading.Event(), threading.Event()

    def make() -> Any:  # noqa: ANN401 - an engine
        begun.set()
        go.wait(MOST_S)
        return fork()

    monkeypatch.setattr(context.engine, "fork", make)
    with runtime.stream(PROMPT, max_tokens=8) as stream:
        next(stream)
        waiting = threads.submit(runtime.generate, PROMPT, max_tokens=2)
        assert begun.wait(MOST_S)
    close_meanwhile(runtime, threads, go, waiting)


def test_a_closed_fork_leaves_the_tokenizer_to_the_other_contexts(open_: Callable[..., Runtime]) -> None:
    first = loaded_bundle(open_()).context()[0]
    fork = first.engine.fork()
    fork.close()
    assert first.engine.tokenizer.tokenize(PROMPT)


@pytest.mark.parametrize("adapter", [None, "command", "whole"])
def test_a_closed_runtime_answers_with_no_adapter(
    open_: Callable[..., Runtime], adapter: str | None, tmp_path: Path
) -> None:
    runtime = open_()
    runtime.generate(PROMPT, adapter="whole", max_tokens=1)
    stream, session = runtime.stream(PROMPT, adapter=adapter), runtime.session(adapter)
    begun = runtime.stream(PROMPT, adapter=adapter, max_tokens=20)
    next(begun)
    runtime.close()
    calls: list[Callable[[], object]] = [
        stream.read,
        begun.read,
        lambda: session.send(PROMPT),
        lambda: session.save(tmp_path / "session"),
        lambda: runtime.generate(PROMPT, adapter=adapter),
        lambda: runtime.classify(PROMPT, ["red", "green"], adapter=adapter),
        lambda: runtime.perplexity(PROMPT, adapter=adapter),
        lambda: runtime.session(adapter),
        runtime.warm,
        runtime.clear_cache,
    ]
    for call in calls:
        with pytest.raises(UsageError, match="the runtime is closed"):
            call()
    session.close()
    runtime.close()


def test_a_model_that_is_loaded_stops_no_call_with_other_adapters_and_does_not_outlive_the_runtime(
    both_of: Callable[[str], Path], threads: ThreadPoolExecutor
) -> None:
    loading, go = threading.Event(), threading.Event()

    def on_event(event: Event) -> None:
        if event.name == "whole":
            loading.set()
            go.wait(MOST_S)

    runtime = Runtime.open(both_of("llama"), contexts=2, disk_mb=0, on_event=on_event)
    merged = threads.submit(runtime.generate, PROMPT, adapter="whole", max_tokens=2)
    assert loading.wait(MOST_S)
    others = [threads.submit(runtime.generate, PROMPT, adapter="command", max_tokens=2, regex=r) for r in (None, "a*")]
    assert all(other.result(MOST_S) for other in others)
    closing = threads.submit(runtime.close)
    assert is_waiting(closing)
    go.set()
    closing.result(MOST_S)
    error = merged.exception(MOST_S)
    assert error is None or "the runtime is closed" in str(error)
    pools = loaded_bundle(runtime)._models.pools
    assert pools
    assert all(context.closed for pool in pools.values() for context in pool.contexts)


def test_an_adapter_that_is_loaded_does_not_outlive_the_runtime(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor
) -> None:
    loading, go = threading.Event(), threading.Event()

    def on_event(event: Event) -> None:
        if event.name == "command":
            loading.set()
            go.wait(MOST_S)

    runtime = open_(on_event=on_event)
    call = threads.submit(runtime.generate, PROMPT, adapter="command", max_tokens=2)
    assert loading.wait(MOST_S)
    close_meanwhile(runtime, threads, go, call)


def test_a_form_is_compiled_once_and_stops_no_call_with_another_form(
    open_: Callable[..., Runtime], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_(contexts=4)
    compile_grammar, compiled, go = output.compile_grammar, [], threading.Event()

    def compile_slowly(tokenizer: Any, grammar: str, tried: str, check: Any) -> tuple[Any, str]:  # noqa: ANN401 - llguidance's
        compiled.append(grammar)
        if "slow" in grammar:
            go.wait(MOST_S)
        return compile_grammar(tokenizer, grammar, tried, check)

    monkeypatch.setattr(output, "compile_grammar", compile_slowly)
    slow = [threads.submit(runtime.generate, PROMPT, choices=["slow"], max_tokens=8) for _ in range(3)]
    wait_for(lambda: compiled)
    assert threads.submit(runtime.generate, PROMPT, choices=["red"], max_tokens=8).result(MOST_S).text == "red"
    go.set()
    assert [future.result(MOST_S).text for future in slow] == ["slow"] * 3
    assert len(compiled) == 2


def test_a_closed_runtime_blames_no_file_of_a_session(open_: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = open_()
    with runtime.session() as session:
        session.save(tmp_path / "talk.session")
    runtime.close()
    with pytest.raises(UsageError, match=r"^the runtime is closed"):
        runtime.load_session(tmp_path / "talk.session")
