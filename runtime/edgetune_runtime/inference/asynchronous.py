"""The asynchronous API: what `Runtime` and `Session` do, for asyncio programs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack, cast

from edgetune_runtime.bundle import CLASSIFICATION, GENERATE, Manifest
from edgetune_runtime.serving.classifier import Embedding
from edgetune_runtime.serving.places import READER, Reader
from edgetune_runtime.text.chat import Message, Prompt
from edgetune_runtime.tools.definitions import Tools

from .adapter_changes import AdapterChanges
from .adapter_choice import Adapters
from .answer import Answer, Stream
from .async_stream import AsyncStream, StreamThreads
from .classification import Classification
from .opening_options import RuntimeOptions
from .options import AnswerOptions
from .routing.router import Route
from .runtime import Runtime
from .scoring import NegativeLogLikelihood
from .session import Carry, Session

T = TypeVar("T")


class AsyncRuntime(AbstractAsyncContextManager["AsyncRuntime"]):
    """A `Runtime` whose calls are awaited: the same names, options, answers and errors.

    async with await AsyncRuntime.open("build/smart-home") as runtime:
        async for piece in runtime.stream("turn off the lamp in the hall", adapter="command"):
            print(piece, end="")

    Each answer is computed on a thread of its own, so the event loop never waits for the engine; an encoder answers on
    `runtime.threads` of them. Cancelling the task that awaits an answer or reads a stream ends the answer and frees its
    context. A call waits for a free context, but not for streams that its own task read last, or one that has ended: if
    for 2 s nobody else reads them, it raises UsageError. `runtime` is the runtime underneath, which may be used too,
    from any thread.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._threads = StreamThreads()
        # Calls of an encoder wait for no context and no stream: any number of them would compute at the same time.
        is_encoder = runtime.manifest.task == CLASSIFICATION
        self._encoder_threads = ThreadPoolExecutor(runtime.threads, "edgetune-call") if is_encoder else None

    @classmethod
    async def open(cls, path: str | Path, **options: Unpack[RuntimeOptions]) -> Self:
        """Open a bundle; options and errors are those of `Runtime.open`."""
        opening = asyncio.create_task(_in_thread(Runtime.open, path, **options))
        try:
            return cls(await asyncio.shield(opening))
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.runtime.manifest

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return self.runtime.adapters

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self.runtime.context_length

    @property
    def contexts(self) -> int:
        """Maximum number of calls that run at the same time."""
        return self.runtime.contexts

    @property
    def engine(self) -> str:
        """Name of the engine that runs the bundle."""
        return self.runtime.engine

    async def generate(
        self, prompt: Prompt, *, adapter: Adapters | Route = None, raw: bool = False, **options: Unpack[AnswerOptions]
    ) -> Answer:
        """Answer a prompt; see `Runtime.generate`."""
        return await self.stream(prompt, adapter=adapter, raw=raw, **options).read()

    def stream(
        self, prompt: Prompt, *, adapter: Adapters | Route = None, raw: bool = False, **options: Unpack[AnswerOptions]
    ) -> AsyncStream:
        """Like `generate`, but yields the text piece by piece; errors are raised by the first read."""

        def open_stream(answer_options: AnswerOptions) -> Stream:
            return self.runtime.stream(prompt, adapter=adapter, raw=raw, **answer_options)

        return _stream(self._threads, open_stream, options)

    async def route(self, prompt: Prompt, call: str = GENERATE) -> Route:
        """The adapter that `auto` means for a prompt; see `Runtime.route`."""
        return await _in_thread(self.runtime.route, prompt, call)

    def session(self, adapter: Adapters = None) -> AsyncSession:
        """Start a conversation with these adapters; see `Runtime.session`."""
        return AsyncSession(self.runtime.session(adapter), self._threads)

    async def load_session(self, path: str | Path) -> AsyncSession:
        """Resume a conversation saved by `AsyncSession.save`; see `Runtime.load_session`."""
        return AsyncSession(await _in_thread(self.runtime.load_session, path), self._threads)

    async def classify(
        self,
        prompt: Prompt,
        labels: Sequence[str] | None = None,
        *,
        adapter: Adapters | Route = None,
        exact: bool = False,
        min_confidence: float | None = None,
    ) -> Classification:
        """The most likely label, and probabilities; see `Runtime.classify`. It is not ended early."""
        classify = partial(self.runtime.classify, adapter=adapter, exact=exact, min_confidence=min_confidence)
        return await self._answer(classify, prompt, labels)

    async def embed(self, text: str) -> Embedding:
        """The pooled last layer for a text, and its number of tokens; see `Runtime.embed`. It is not ended early."""
        return await self._answer(self.runtime.embed, text)

    async def perplexity(self, text: str, *, adapter: Adapters = None) -> float:
        """The perplexity of a text; see `Runtime.perplexity`. It is not ended early."""
        return (await self.negative_log_likelihood(text, adapter=adapter)).perplexity

    async def negative_log_likelihood(self, text: str, *, adapter: Adapters = None) -> NegativeLogLikelihood:
        """The negative log-likelihood of a text; see `Runtime.negative_log_likelihood`. It is not ended early."""
        return await _in_thread(self.runtime.negative_log_likelihood, text, adapter=adapter)

    async def warm(self, adapters: Sequence[Adapters] | None = None, *, tools: Tools | None = None) -> dict[str, int]:
        """Compute the missing states of fixed prompts; see `Runtime.warm`. It is not ended early."""
        return await _in_thread(self.runtime.warm, adapters, tools=tools)

    async def add_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Add an adapter of another bundle on the same base; see `Runtime.add_adapter`."""
        return await _in_thread(self.runtime.add_adapter, path, name)

    async def remove_adapter(self, name: str) -> None:
        """Remove an adapter, after running calls; see `Runtime.remove_adapter`."""
        await _in_thread(self.runtime.remove_adapter, name)

    async def reload(self) -> AdapterChanges:
        """Take over the bundle on disk; see `Runtime.reload`."""
        return await _in_thread(self.runtime.reload)

    async def clear_cache(self) -> None:
        """Drop all sequences and cached states, except those on disk, after running calls."""
        await _in_thread(self.runtime.clear_cache)

    async def close(self) -> None:
        """End unfinished streams, which then raise UsageError, and free base and adapters."""
        await self._threads.close()
        await _in_thread(self.runtime.close)

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def _answer(self, function: Callable[..., T], *arguments: object) -> T:
        if self._encoder_threads is None:
            return await _in_thread(function, *arguments)
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._encoder_threads, run, function, *arguments)


class AsyncSession(AbstractAsyncContextManager["AsyncSession"]):
    """A `Session` whose calls are awaited, one after another; `threads` are those of its runtime."""

    def __init__(self, session: Session, threads: StreamThreads) -> None:
        self._session, self._threads = session, StreamThreads(threads)

    @property
    def adapter(self) -> Adapters:
        """The current adapters."""
        return self._session.adapter

    @property
    def history(self) -> list[Message]:
        """The messages so far."""
        return self._session.history

    async def send(self, message: Prompt, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a message; see `Session.send`."""
        return await self.stream(message, **options).read()

    def stream(self, message: Prompt, **options: Unpack[AnswerOptions]) -> AsyncStream:
        """Like `send`, but yields the text piece by piece; see `Session.stream`."""
        return _stream(self._threads, lambda answer_options: self._session._begin(message, **answer_options), options)

    async def use(self, adapter: Adapters, *, carry: Carry = "recompute") -> None:
        """Use other adapters from now on; see `Session.use`."""
        await _in_thread(self._session.use, adapter, carry=carry)

    async def save(self, path: str | Path) -> None:
        """Write the conversation and its state to a file; see `Session.save`. UsageError while a stream is open."""
        self._threads.require_none_open()
        await _in_thread(self._session.save, path)

    async def close(self) -> None:
        """End unfinished streams, which then raise UsageError, and drop the session's state.

        A second call does nothing.
        """
        await self._threads.end_all()
        await _in_thread(self._session.close)

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _stream(
    threads: StreamThreads, open_stream: Callable[[AnswerOptions], Stream], options: Mapping[str, Any]
) -> AsyncStream:
    def with_cancel(event: threading.Event) -> Stream:
        return open_stream(cast("AnswerOptions", {**options, "cancel": event}))

    return AsyncStream(threads, with_cancel, options.get("cancel"))


async def _in_thread(function: Callable[..., T], *arguments: object, **options: object) -> T:
    """What a function returns on a thread of its own, where its calls wait for no stream that this task alone reads.

    None of asyncio's, which are few: a task may need one of them to read on the stream that the calls wait for.
    """
    reader = Reader(asyncio.current_task())

    def call() -> T:
        READER.set(reader)
        return function(*arguments, **options)

    return await call_in_thread(call, "edgetune-call")


async def call_in_thread(function: Callable[[], T], name: str, *, daemon: bool | None = None) -> T:
    """What a function returns or raises on a new thread, whose options are those of `threading.Thread`.

    A task that stops waiting does not end the call.
    """
    result = Future[T]()
    # So that a task that is cancelled, as at the end of the event loop, does not cancel it.
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    # With the context variables of the task, such as those of tracing.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=daemon).start()
    return await asyncio.wrap_future(result)


def _close_opened(opening: asyncio.Task[Runtime]) -> None:
    """Close a runtime that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
