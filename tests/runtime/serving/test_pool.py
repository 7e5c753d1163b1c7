from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from edgetune_runtime import BusyError, Runtime, UsageError
from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.batches import CHUNK
from edgetune_runtime.threads.machine import usable_cores
from runtime.serving.waiting import opening

ENGINES = ("gguf", "onnx")
PROMPT = "turn on the light"


@pytest.fixture(params=ENGINES)
def open_(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path]) -> Iterator[Callable[..., Runtime]]:
    """Opens the bundle of long prompts with options, in each engine."""
    with opening(prompted_of("llama"), request.param) as make:
        yield make


def test_two_streams_of_one_thread_give_the_answers_of_each_alone(open_: Callable[..., Runtime]) -> None:
    runtime = open_(contexts=2)
    alone = {name: runtime.generate(PROMPT, adapter=name, max_tokens=8).text for name in ("one", "two")}
    streams = {name: runtime.stream(PROMPT, adapter=name, max_tokens=8) for name in ("one", "two")}
    texts = dict.fromkeys(streams, "")
    while any(stream.answer is None for stream in streams.values()):
        for name, stream in streams.items():
            texts[name] += next(stream, "")
    assert texts == alone
    assert len(loaded_bundle(runtime).pool(None)[0].contexts) == 2


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_calls_compute_at_the_same_time_where_threads_can_be_divided(
    open_: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, most = open_(contexts=2, threads=2), 0
    context, _ = loaded_bundle(runtime).context()
    turns, engine = context.shared.governor._turns, type(context.engine)
    decode_all = engine.decode_all

    def looking(engine: Engine, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        nonlocal most
        most = max(most, len(turns._running))
        return decode_all(engine, tokens, last=last)

    def answer(name: str) -> str:
        return runtime.generate(PROMPT, adapter=name, max_tokens=60, temperature=2.0, seed=1).text

    monkeypatch.setattr(engine, "decode_all", looking)
    alone = [answer(name) for name in ("one", "two")]
    assert most == 1
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            assert list(threads.map(answer, ("one", "two"))) == alone
    assert most == (2 if context.engine.adjusts_threads else 1)
    assert turns.is_idle


@pytest.mark.usefixtures("short_patience")
def test_calls_beyond_the_limit_of_waiting_ones_are_refused(open_: Callable[..., Runtime]) -> None:
    runtime = open_(contexts=1, max_waiting=0)
    stream = runtime.stream(PROMPT, max_tokens=50)
    next(stream)
    message = "0 calls are already waiting for one of 1 contexts"
    with ThreadPoolExecutor(1) as other, pytest.raises(BusyError, match=message):
        other.submit(runtime.generate, PROMPT).result()
    with pytest.raises(UsageError, match="stream"):
        runtime.generate(PROMPT)
    stream.close()
    assert runtime.generate(PROMPT, max_tokens=1).tokens <= 1


def test_a_deadline_holds_while_a_call_waits_in_its_prompt_and_between_tokens(open_: Callable[..., Runtime]) -> None:
    runtime = open_(contexts=1)
    stream = runtime.stream(PROMPT, max_tokens=200, adapter="one")
    next(stream)
    with ThreadPoolExecutor(1) as other:
        begin = time.monotonic()
        answer = other.submit(runtime.generate, PROMPT, deadline_s=0.2).result()
        assert (answer.stop_reason, answer.text) == ("deadline", "")
        assert time.monotonic() - begin >= 0.2
    stream.close()
    assert runtime.generate(PROMPT, deadline_s=1e-6).stop_reason == "deadline"
    stream = runtime.stream(PROMPT, deadline_s=0.5, max_tokens=200, temperature=2.0, seed=1)
    for _ in stream:
        time.sleep(0.1)
    assert stream.answer is not None
    assert stream.answer.stop_reason == "deadline"
    with pytest.raises(UsageError, match="deadline_s"):
        runtime.generate(PROMPT, deadline_s=0)


def test_a_cancelled_call_returns_its_tokens_so_far_and_frees_its_context(open_: Callable[..., Runtime]) -> None:
    runtime, cancel = open_(contexts=1), threading.Event()
    expected = runtime.generate(PROMPT, adapter="one", max_tokens=200)
    stream = runtime.stream(PROMPT, adapter="one", cancel=cancel, max_tokens=200)
    pieces = [next(stream)]
    cancel.set()
    pieces += stream
    assert stream.answer is not None
    assert stream.answer.stop_reason == "cancelled"
    assert stream.answer.tokens <= 3
    assert expected.text.startswith(stream.answer.text.rstrip("�"))
    assert runtime.generate(PROMPT, adapter="one", max_tokens=200).text == expected.text


def test_a_prompt_is_computed_in_chunks_between_which_others_have_their_turn(open_: Callable[..., Runtime]) -> None:
    runtime = open_(contexts=2)
    call = loaded_bundle(runtime).call("play " * 110, "one")
    assert len(call.job.tokens) > CHUNK
    order: list[str] = []

    def look() -> None:
        # Another call computes between two chunks of this one. The watch asks as well, while a chunk is computed.
        if threading.current_thread() is not threading.main_thread():
            return
        order.append("chunk")
        if order.count("chunk") == 2:
            with ThreadPoolExecutor(1) as other:
                other.submit(runtime.generate, "stop", adapter="two", max_tokens=1).result(60)
            order.append("other")

    job = replace(call.job, check=look)
    with call.lease(job) as context:
        context.run(job)
    assert order[:4] == ["chunk", "chunk", "other", "chunk"] or order[:3] == ["chunk", "chunk", "other"]
