from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Answer, AsyncRuntime, NotFoundError, Runtime, UsageError
from edgetune_runtime.inference.async_stream import AsyncStream
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.serving.classifier import Embedding

PROMPT = "turn on the light"


@asynccontextmanager
async def opened(bundle: Path, **options: int) -> AsyncIterator[AsyncRuntime]:
    async with await AsyncRuntime.open(bundle, disk_mb=0, **options) as runtime:
        yield runtime


def free(runtime: AsyncRuntime) -> bool:
    """Whether no call holds a context."""
    return all(context.holder is None for context in loaded_bundle(runtime.runtime).pool(None)[0].contexts)


def test_an_awaited_answer_and_a_stream_are_those_of_the_runtime(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            expected = runtime.runtime.generate(PROMPT, adapter="command", max_tokens=12)
            answer = await runtime.generate(PROMPT, adapter="command", max_tokens=12)
            assert (answer.text, answer.stop_reason) == (expected.text, expected.stop_reason)
            stream = runtime.stream(PROMPT, adapter="command", max_tokens=12)
            assert stream.answer is None
            pieces = [piece async for piece in stream]
            assert len(pieces) > 1
            assert "".join(pieces) == expected.text
            assert stream.answer is not None
            assert stream.answer.text == expected.text
            assert [piece async for piece in stream] == []

    asyncio.run(main())


def test_a_call_has_the_context_variables_of_its_task(bundle: Path) -> None:
    request, seen = ContextVar("request", default="none"), list[str]()

    async def main() -> None:
        options = {"disk_mb": 0, "on_event": lambda _: seen.append(request.get())}
        async with await AsyncRuntime.open(bundle, **options) as runtime:
            request.set("first")
            for call in (runtime.classify(PROMPT, ("on", "off"), adapter="command"), runtime.generate(PROMPT)):
                seen.clear()
                await call
                assert {*seen} == {"first"}

    asyncio.run(main())


def test_tasks_that_share_a_stream_all_come_to_its_end(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=8)
            async with asyncio.timeout(10):
                answers = await asyncio.gather(*(stream.read() for _ in range(3)))
            assert answers == [stream.answer] * 3
            failing = runtime.stream(PROMPT, adapter="tome")
            async with asyncio.timeout(10):
                errors = await asyncio.gather(failing.read(), failing.read(), return_exceptions=True)
            assert all(isinstance(error, NotFoundError) for error in errors)

    asyncio.run(main())


def test_answers_of_several_tasks_are_those_of_each_alone(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=2) as runtime:
            choices = [None, "command", "tone", {"command": 0.5, "tone": 0.5}]
            alone = [await runtime.generate(PROMPT, adapter=choice, max_tokens=8) for choice in choices]
            together = await asyncio.gather(
                *(runtime.generate(PROMPT, adapter=choice, max_tokens=8) for choice in choices * 4)
            )
            assert [answer.text for answer in together] == [answer.text for answer in alone * 4]

    asyncio.run(main())


def test_the_event_loop_runs_while_an_answer_is_computed(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            answering = asyncio.create_task(runtime.generate(PROMPT, max_tokens=200))
            turns = 0
            while not answering.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 10

    asyncio.run(main())


async def cancel_a_task(runtime: AsyncRuntime) -> None:
    task = asyncio.create_task(runtime.generate(PROMPT, max_tokens=230))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_a_reader(runtime: AsyncRuntime) -> None:
    stream = runtime.stream(PROMPT, max_tokens=230)

    async def read() -> None:
        await anext(stream)
        await asyncio.Event().wait()

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    await stream.aclose()


async def close_it(runtime: AsyncRuntime) -> None:
    stream = runtime.stream(PROMPT, max_tokens=230)
    await anext(stream)
    await stream.aclose()
    assert stream.answer is None
    with pytest.raises(UsageError, match="closed before its end"):
        await stream.read()


async def leave_its_block(runtime: AsyncRuntime) -> None:
    async with runtime.stream(PROMPT, max_tokens=230) as stream:
        async for _ in stream:
            break


@pytest.mark.parametrize("end", [cancel_a_task, cancel_a_reader, close_it, leave_its_block])
def test_an_answer_that_ends_early_has_freed_its_context(
    end: Callable[[AsyncRuntime], Awaitable[None]], bundle: Path
) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=1, max_waiting=0) as runtime:
            expected = runtime.runtime.generate(PROMPT, max_tokens=8).text
            await end(runtime)
            assert free(runtime)
            assert (await runtime.generate(PROMPT, max_tokens=8)).text == expected

    asyncio.run(main())


def test_dropping_a_stream_frees_its_context(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=1) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=230)
            await anext(stream)
            del stream
            gc.collect()
            begin = time.monotonic()
            while not free(runtime):
                await asyncio.sleep(0.001)
                assert time.monotonic() < begin + 5

    asyncio.run(main())


def test_a_stream_that_was_left_in_a_closed_event_loop_is_no_obstacle(bundle: Path) -> None:
    runtime = asyncio.run(AsyncRuntime.open(bundle, disk_mb=0))
    stream = runtime.stream(PROMPT, max_tokens=230)

    async def first() -> str:
        return await anext(stream)

    assert asyncio.run(first())
    asyncio.run(asyncio.wait_for(runtime.close(), 10))


def test_a_stream_that_nobody_reads_stops_computing_a_few_pieces_ahead(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=1) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=230)
            await anext(stream)
            context, _ = loaded_bundle(runtime.runtime).context(None)
            before = 0
            while before != len(context.tokens):
                before = len(context.tokens)
                await asyncio.sleep(0.1)
            assert not free(runtime)
            assert (await stream.read()).tokens > 20

    asyncio.run(main())


def test_a_cancel_event_ends_an_answer_with_the_text_so_far(bundle: Path) -> None:
    async def main() -> None:
        cancel = threading.Event()
        async with opened(bundle) as runtime:
            stream = runtime.stream(PROMPT, cancel=cancel, max_tokens=230)
            await anext(stream)
            cancel.set()
            answer = await stream.read()
            assert answer.stop_reason == "cancelled"
            assert answer.tokens < 40

    asyncio.run(main())


def test_errors_are_raised_by_the_first_read(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            stream = runtime.stream(PROMPT, adapter="comand")
            with pytest.raises(NotFoundError, match="comand"):
                await anext(stream)
            with pytest.raises(UsageError, match="max_tokens"):
                await runtime.generate(PROMPT, max_tokens=0)
        with pytest.raises(UsageError, match="closed"):
            await runtime.generate(PROMPT)

    asyncio.run(main())


@pytest.mark.parametrize("of", [lambda runtime: runtime, lambda runtime: runtime.session("command")])
def test_closing_ends_open_streams_of_the_runtime_and_of_sessions(
    of: Callable[[AsyncRuntime], Any], bundle: Path
) -> None:
    async def main() -> None:
        runtime = await AsyncRuntime.open(bundle, disk_mb=0)
        stream = of(runtime).stream(PROMPT, max_tokens=230)
        await anext(stream)
        await asyncio.wait_for(runtime.close(), 10)
        with pytest.raises(UsageError, match="closed"):
            await stream.read()

    asyncio.run(main())


async def in_10_s(call: Awaitable[object], stream: AsyncStream) -> None:
    """Await a call, and close the stream even if the call waits for it."""
    try:
        await asyncio.wait_for(call, 10)
    finally:
        await stream.aclose()


@pytest.mark.usefixtures("short_patience")
def test_a_call_that_would_wait_for_the_stream_of_its_own_task_is_an_error(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=1) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=60)
            await anext(stream)
            for call in (runtime.generate(PROMPT), runtime.classify(PROMPT, ["on", "off"])):
                with pytest.raises(UsageError, match="a stream is still open that nobody else reads"):
                    await call
            # That of another task waits.
            asking = asyncio.create_task(runtime.generate(PROMPT, max_tokens=4))
            await asyncio.sleep(1)
            assert not asking.done()
            assert (await stream.read()).tokens == 60
            assert (await asking).tokens == 4

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.usefixtures("short_patience")
def test_a_call_that_would_wait_for_the_stream_of_a_task_that_has_ended_is_an_error(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=1) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=60)
            # Python 3.11 also makes a task of what `wait_for` waits for.
            await asyncio.create_task(anext(stream))
            with pytest.raises(UsageError, match="a stream is still open that nobody else reads"):
                await in_10_s(runtime.generate(PROMPT), stream)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_stream_is_read_in_the_event_loop_in_which_it_began(bundle: Path) -> None:
    async def begun() -> tuple[AsyncRuntime, AsyncStream]:
        runtime = await AsyncRuntime.open(bundle, disk_mb=0)
        stream = runtime.stream(PROMPT, max_tokens=20)
        await anext(stream)
        return runtime, stream

    async def read_on() -> None:
        with pytest.raises(UsageError, match="the stream began in another event loop"):
            await anext(stream)

    runtime, stream = asyncio.run(begun())
    asyncio.run(read_on())
    runtime.runtime.close()


def test_a_call_that_waits_for_a_stream_leaves_asyncio_its_threads(bundle: Path) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with opened(bundle, contexts=1) as runtime:
            stream = runtime.stream(PROMPT, max_tokens=60)
            await anext(stream)
            classifying = asyncio.create_task(runtime.classify(PROMPT, ["on", "off"]))
            await asyncio.sleep(0)
            await in_10_s(asyncio.to_thread(time.monotonic), stream)
            assert (await classifying).label in {"on", "off"}

    asyncio.run(main())


def test_many_calls_of_an_encoder_have_few_threads(encoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with await AsyncRuntime.open(encoder_bundle, threads=2) as runtime:
            classifier = loaded_bundle(runtime.runtime).classifier
            assert classifier is not None
            expected, embedding, used = runtime.runtime.embed(PROMPT), classifier.embedding, set[threading.Thread]()

            def embed(text: str) -> Embedding:
                used.add(threading.current_thread())
                return embedding(text)

            monkeypatch.setattr(classifier, "embedding", embed)
            assert await asyncio.gather(*(runtime.embed(PROMPT) for _ in range(100))) == [expected] * 100
            assert 1 <= len(used) <= 2
        with pytest.raises(UsageError, match="closed"):
            await runtime.embed(PROMPT)

    asyncio.run(main())


def test_leaving_a_session_ends_its_open_streams_and_no_others(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=2) as runtime:
            other = runtime.stream(PROMPT, max_tokens=60)
            await anext(other)
            async with runtime.session("command") as session:
                stream = session.stream(PROMPT, max_tokens=230)
                await anext(stream)
                await in_10_s(session.close(), stream)
            with pytest.raises(UsageError, match="closed before its end"):
                await stream.read()
            assert (await other.read()).tokens == 60

    asyncio.run(main())


def test_a_session_answers_one_message_at_a_time(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle, contexts=2) as runtime, runtime.session("command") as session:
            sending = [session.send(text, max_tokens=4) for text in ("play", "stop")]
            answer, error = await asyncio.gather(*sending, return_exceptions=True)
            assert isinstance(answer, Answer)
            assert isinstance(error, UsageError)
            assert [message["content"] for message in session.history] == ["play", answer.text]

    asyncio.run(main())


def test_a_session_is_not_saved_while_its_stream_is_open(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "talk.kv"
        async with opened(bundle) as runtime, runtime.session("command") as session:
            await session.send("play", max_tokens=4)
            history = session.history
            stream = session.stream(PROMPT, max_tokens=230)
            await anext(stream)
            with pytest.raises(UsageError, match="stream of this session is still open"):
                await in_10_s(session.save(path), stream)
            await session.save(path)
            async for _ in session.stream(PROMPT, max_tokens=230):
                break
            # A stream that nobody can read any more is not open.
            await session.save(path)
            async with await runtime.load_session(path) as again:
                assert again.history == history

    asyncio.run(main())


def test_a_session_keeps_its_history_and_changes_adapters(bundle: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            async with runtime.session("command") as session:
                await session.send("play", max_tokens=4)
                await session.use("tone")
                answer = await session.stream("stop", max_tokens=4).read()
                await session.save(tmp_path / "talk.kv")
                history = session.history
            assert [message["content"] for message in history] == [
                "play", history[1]["content"], "stop", answer.text
            ]  # fmt: skip
            with runtime.runtime.session("command") as other:
                other.send("play", max_tokens=4)
                other.use("tone")
                assert other.send("stop", max_tokens=4).text == answer.text
            async with await runtime.load_session(tmp_path / "talk.kv") as again:
                assert (again.adapter, again.history) == ("tone", history)

    asyncio.run(main())


def test_other_calls_are_those_of_the_runtime(bundle: Path) -> None:
    async def main() -> None:
        async with opened(bundle) as runtime:
            expected = runtime.runtime.classify("play", adapter="tone")
            assert await runtime.classify("play", adapter="tone") == expected
            assert await runtime.perplexity("play on") == runtime.runtime.perplexity("play on")
            assert await runtime.warm() == runtime.runtime.warm()
            await runtime.clear_cache()
            assert runtime.adapters == runtime.runtime.adapters
            assert runtime.context_length == runtime.runtime.context_length
            assert runtime.manifest is runtime.runtime.manifest

    asyncio.run(main())


def test_an_existing_runtime_can_be_wrapped(runtime: Runtime) -> None:
    async def main() -> str:
        return (await AsyncRuntime(runtime).generate(PROMPT, max_tokens=4)).text

    assert asyncio.run(main()) == runtime.generate(PROMPT, max_tokens=4).text
