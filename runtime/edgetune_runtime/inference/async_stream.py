"""Run a stream on a thread of its own and hand its pieces to an asyncio event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager

from edgetune_runtime.errors import UsageError
from edgetune_runtime.limits import check_cancel
from edgetune_runtime.serving.places import READER, Reader
from edgetune_runtime.wording import CLOSED

from .answer import CLOSED_EARLY, STILL_OPEN, Answer, Stream

_AHEAD = 16
"""Pieces that are computed before they are read, so that decoding does not wait for a reader that keeps up."""

OpenStream = Callable[[threading.Event], Stream]
"""Opens a stream with this event as its `cancel`."""


class StreamThreads:
    """The threads of the unfinished streams of a runtime, or of one of its sessions, so that closing it can end them.

    Those of a session are also among those of its `runtime`.
    """

    def __init__(self, runtime: StreamThreads | None = None) -> None:
        self.running: set[_StreamThread] = set()
        self._runtime = runtime
        self._closed = False

    def start(self, open_stream: OpenStream, cancel: threading.Event | None) -> _StreamThread:
        """Start reading a stream; UsageError after `close`, and while another one of the session is open."""
        if self._closed:
            raise UsageError(*CLOSED)
        if self._runtime is None:
            thread = _StreamThread(open_stream, cancel)
        else:
            self.require_none_open()
            thread = self._runtime.start(open_stream, cancel)
        self.running.add(thread)
        thread.ended.add_done_callback(lambda _: self.running.discard(thread))
        return thread

    def require_none_open(self) -> None:
        """Raise UsageError if a stream is open that somebody may still read."""
        if any(thread.is_open for thread in list(self.running)):
            raise UsageError(*STILL_OPEN)

    async def end_all(self) -> None:
        """End the streams, which then raise UsageError; returns once their contexts are free."""
        for thread in list(self.running):
            await thread.stop()

    async def close(self) -> None:
        """End all streams, and refuse new ones."""
        self._closed = True
        await self.end_all()


class AsyncStream(AsyncIterator[str], AbstractAsyncContextManager["AsyncStream"]):
    """Asynchronous iterator over the pieces of an answer; afterwards `answer` has all of it.

    It starts when it is first read, computes a few pieces ahead of its reader and then waits for it. `aclose`,
    cancelling the task that reads it, and leaving its `async with` block end it early and free its context.
    """

    def __init__(self, threads: StreamThreads, open_stream: OpenStream, cancel: threading.Event | None) -> None:
        self._threads, self._open, self._cancel = threads, open_stream, cancel
        self._thread: _StreamThread | None = None
        self._ended = False
        self.answer: Answer | None = None
        """The whole answer with its timings; None until the stream is exhausted."""

    async def __anext__(self) -> str:
        if self._ended:
            raise StopAsyncIteration
        if self._thread is None:
            self._thread = self._threads.start(self._open, self._cancel)
        try:
            piece = await self._thread.next_piece()
        except BaseException:
            await self.aclose()
            raise
        if piece is None:
            self._ended, self.answer = True, self._thread.answer
            raise StopAsyncIteration
        return piece

    async def read(self) -> Answer:
        """Wait for the whole answer and return it; UsageError if the stream was closed before its end."""
        async for _ in self:
            pass
        if self.answer is None:
            raise UsageError(*CLOSED_EARLY)
        return self.answer

    async def aclose(self) -> None:
        """Stop generating; returns once other calls can have the context."""
        self._ended = True
        if self._thread is not None:
            await self._thread.stop()

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.abandon()


class _StreamThread:
    """A thread that reads a stream into a queue of the running event loop."""

    def __init__(self, open_stream: OpenStream, cancel: threading.Event | None) -> None:
        self._loop = asyncio.get_running_loop()
        # Not asyncio's, as another event loop may wait for it after this one was closed.
        self.ended: Future[None] = Future()
        # So that none who stops waiting for it cancels it.
        self.ended.set_running_or_notify_cancel()
        self.answer: Answer | None = None
        self._open, self._cancel = open_stream, _EitherEvent(cancel)
        self._abandoned = False
        self._reader = Reader(asyncio.current_task())
        self._error: BaseException | None = None
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        # A daemon, because a stream that nobody reads any more would keep the process from exiting.
        # It has the context variables of the task, such as those of tracing.
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run,), name="edgetune-stream", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the stream has neither ended nor been told to."""
        return not (self._abandoned or self.ended.done())

    async def next_piece(self) -> str | None:
        """The next piece, None after the last one; raises what the stream raised.

        UsageError in another event loop than the one in which the stream began.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("the stream began in another event loop", "read it there, or begin another one")
        self._reader.task = asyncio.current_task()
        piece = await self._pieces.get()
        self._room.release()
        if piece is None:
            # Other tasks may read the stream too.
            self._pieces.put_nowait(None)
            if self._error is not None:
                raise self._error
        return piece

    async def stop(self) -> None:
        """End the stream; returns once its context is free."""
        self.abandon()
        await asyncio.wrap_future(self.ended)

    def abandon(self) -> None:
        """End the stream as soon as possible, without waiting for it."""
        self._abandoned = True
        self._cancel.set()
        self._room.release()

    def _run(self) -> None:
        READER.set(self._reader)
        try:
            with self._open(self._cancel) as stream:
                for piece in stream:
                    self._room.acquire()
                    if self._abandoned or not self._call_in_loop(self._pieces.put_nowait, piece):
                        break
                if not self._abandoned:
                    self.answer = stream.answer
        except BaseException as error:
            self._error = error
        self.ended.set_result(None)
        self._call_in_loop(self._finish)

    def _call_in_loop(self, function: Callable[..., None], *arguments: str) -> bool:
        """Call a function in the event loop; False if the loop was closed meanwhile."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _finish(self) -> None:
        if self._abandoned and self.answer is None and self._error is None:
            self._error = UsageError(*CLOSED_EARLY)
        self._pieces.put_nowait(None)


class _EitherEvent(threading.Event):
    """An event that is also set while another one is."""

    def __init__(self, other: threading.Event | None) -> None:
        super().__init__()
        check_cancel(other)
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())
