"""Answer requests with the runtime: within the queue and the limits, counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from edgetune_runtime.answer_log.log import AnswerLog
from edgetune_runtime.bundle import ASK
from edgetune_runtime.errors import BusyError, EdgetuneError, UnsureError, UsageError
from edgetune_runtime.inference.adapter_choice import Adapters
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.inference.asynchronous import AsyncRuntime
from edgetune_runtime.inference.classification import Classification
from edgetune_runtime.inference.following import FollowedBundle
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.states.cache import name_of
from edgetune_runtime.text.chat import Prompt
from edgetune_runtime.tools.calls import answer_text

from .answer_queue import AnswerQueue
from .answer_request import ARRIVED, CLIENT, AnswerRequest, ClassifyRequest
from .daemon_threads import DaemonThreads
from .good_answers import GoodAnswers
from .metrics import Metrics
from .models import Models, base_name
from .problems import RequestError, StoppingError
from .rewriting import Rewriter
from .settings import Access, ServerLimits

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_MAX_TEXTS = 2048
"""Texts in one request for embeddings, as in OpenAI's API, and for labels."""
_LOG_THREADS = 4
_MAX_WAITING_FOR_LOG = 64
"""Answers and corrections that wait to be logged; redaction may take seconds for each."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one of an answer has no text and has the whole `answer`."""

    index: int
    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. With `warms`, the states of all fixed prompts are computed first, and after a change.

    Each of `rewriters` is a model of its own. Answers are written to `log`, if any.
    """

    access: Access
    limits: ServerLimits
    warms: bool
    rewriters: Sequence[Rewriter]
    log: AnswerLog | None


class Answering:
    """Answers requests with one runtime; UsageError if a rewriter has the name of another model."""

    def __init__(self, runtime: AsyncRuntime, serving: Serving) -> None:
        self.runtime, self.serving, self.limits, self.log = runtime, serving, serving.limits, serving.log
        self._rewriters = {rewriter.name: rewriter for rewriter in serving.rewriters}
        self.queue = AnswerQueue(runtime.contexts, self.limits.waiting)
        loaded_bundle(runtime.runtime).deferring = self.queue.elsewhere
        self.log_threads = DaemonThreads("the log of answers", _LOG_THREADS, _MAX_WAITING_FOR_LOG)
        self.metrics = Metrics(self.queue)
        self.is_warming = False
        self._end = threading.Event()
        self.bundle = FollowedBundle(runtime)
        self._look()
        if self.models.hidden:
            name = self.models.hidden[0]
            raise UsageError(f"--rewrite {name}=… has the name of another model", "choose a name of its own")

    async def pieces(self, request: AnswerRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of the answers, one answer after another. Close it (`aclosing`) to free the context at once.

        Raises what `Runtime.generate` does, and BusyError for too long a queue and a server that stops.
        """
        index, logs, end = 0, list[Callable[[], object]](), None
        try:
            async with self._place(request.arrived) as end_s:
                if rewriter := self._rewriters.get(base_name(request.model)):
                    request = await rewriter.rewrite(request, end_s)
                for prompt in request.prompts:
                    for number in range(request.count):
                        async with aclosing(
                            self._answer(request, prompt, number, index, end_s=end_s, logs=logs)
                        ) as pieces:
                            async for piece in pieces:
                                if end is not None:
                                    yield end
                                end = None if piece.answer is None else piece
                                if end is None:
                                    yield piece
                        index += 1
        finally:
            # Without the place, as redaction may take seconds; before the reply ends, so that it can be corrected then.
            await self._write_logs(logs)
        if end is not None:
            yield end

    async def answers(self, request: AnswerRequest) -> list[Answer]:
        """The whole answers; the same errors as `pieces`."""
        async with aclosing(self.pieces(request)) as pieces:
            return [piece.answer async for piece in pieces if piece.answer is not None]

    async def embeddings(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """The embeddings of texts, each of length 1, and their tokens.

        Raises UsageError for a bundle without an encoder, RequestError for too many texts and if they take too long,
        and BusyError for too long a queue and a server that stops.
        """
        found = await self._each(texts, self.runtime.embed, "embedded")
        return [_normalized(each.vector) for each in found], sum(each.tokens for each in found)

    async def labels(self, request: ClassifyRequest) -> list[Classification]:
        """The label of each text; the errors of `Runtime.classify`, and those of `embeddings` for many texts.

        Of more texts than a request may have answers, none is logged: redaction may take seconds for each.
        """
        classify = partial(self.runtime.classify, adapter=request.adapters, **request.options)
        found, logs = await self._each(request.texts, classify, "classified"), list[Callable[[], object]]()
        for index, (text, one) in enumerate(zip(request.texts, found, strict=True)):
            adapters = request.adapters if one.route is None else one.route.adapter
            self.metrics.count_sureness(adapters, one)
            name = adapter_name(adapters)
            if self.log is not None and name is not None and len(found) <= self.limits.answers:
                about = partial(self.log.answered, text, one.label, adapter=name, confidence=one.confidence)
                logs.append(partial(about, answer_id=answer_id(request.id, index)))
        await self._write_logs(logs)
        return found

    async def warm(self) -> None:
        """Compute the missing states of all fixed prompts, until the server stops; `is_warming` is set meanwhile."""
        self.is_warming = True
        try:
            for choice in (None, *self.runtime.adapters):
                if not self.queue.stopping:
                    try:
                        await self.runtime.warm([choice])
                    except EdgetuneError as error:
                        _LOG.warning("the prompt of %s is not warm: %s", name_of(choice), error)
        finally:
            self.is_warming = False

    async def reload(self) -> None:
        """Take over the bundle on disk; see `FollowedBundle`."""
        changes = await self.bundle.reload()
        if changes is None:
            return
        self._look()
        for name in self.models.hidden:
            _LOG.warning("the bundle has a model %r, which cannot be used: a --rewrite has its name", name)
        for name in changes.removed:
            self.metrics.forget(name)
        if self.serving.warms:
            await self.warm()

    def _look(self) -> None:
        """Read again which models the bundle has now."""
        names = [rewriter.name for rewriter in self.serving.rewriters]
        runtime = self.runtime.runtime
        self.models = Models(runtime.manifest, runtime.engine, names, runtime.route)
        self.good_answers = GoodAnswers(self.bundle.folder)

    def end(self) -> None:
        """End running answers, which then fail with BusyError, and requests that still are rewritten."""
        self._end.set()
        for rewriter in self._rewriters.values():
            rewriter.end()

    @asynccontextmanager
    async def _place(self, arrived: float) -> AsyncGenerator[float, None]:
        """Run the block when its turn comes; gives the time at which a request that arrived then has to end."""
        # A request that waits outlasts the answers that came with it, and has time for its own.
        end_s, more_s = arrived + self.limits.request_s, self.limits.request_s / 4
        async with self.queue.place(_seconds_until(end_s) + more_s, CLIENT.get()):
            yield max(end_s, time.monotonic() + more_s)

    async def _answer(
        self,
        request: AnswerRequest,
        prompt: Prompt,
        number: int,
        index: int,
        *,
        end_s: float,
        logs: list[Callable[[], object]],
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer; `logs` gets what is called to log it."""
        options = {
            **request.options,
            "cancel": self._end,
            "deadline_s": _seconds_until(end_s),
        }
        if number and options.get("seed") is not None:
            # Answers with one seed would be the same.
            options["seed"] += number
        async with self.runtime.stream(prompt, adapter=request.route or request.adapters, **options) as stream:
            is_first = index == 0
            try:
                async for text in stream:
                    if is_first:
                        self.metrics.count_first_piece(request.adapters, request.arrived)
                        is_first = False
                    if request.finish is None:
                        yield Piece(index, text)
                if is_first:
                    # An answer of calls alone has no other piece.
                    self.metrics.count_first_piece(request.adapters, request.arrived)
            except UnsureError as error:
                if isinstance(error.answer, Answer):
                    self.metrics.count_answer(request.adapters, error.answer)
                    logs += self._logs(request, prompt, error.answer, index)
                raise
            answer = stream.answer
        assert answer is not None
        if answer.stop_reason == "cancelled":
            raise StoppingError
        self.metrics.count_answer(request.adapters, answer)
        await self.good_answers.add()
        logs += self._logs(request, prompt, answer, index)
        if request.finish is not None:
            if answer.instead != ASK:
                answer = await request.finish(answer)
            if answer.content:
                yield Piece(index, answer.content)
        yield Piece(index, "", replace(answer, tool_calls=answer.tool_calls[: request.max_calls]))

    async def _each(self, texts: Sequence[str], call: Callable[[str], Awaitable[T]], done: str) -> list[T]:
        """What `call` gives for each text; RequestError for a wrong one, too many, and if they take too long."""
        if len(texts) > _MAX_TEXTS:
            remedy = f"send at most {_MAX_TEXTS} per request"
            raise RequestError(f"input has {len(texts)} texts", remedy, param="input")
        limit_s, found = self.limits.request_s, list[T]()
        async with self._place(ARRIVED.get(time.monotonic())) as end_s:
            for text in texts:
                self._check(end_s, f"{len(found)} of {len(texts)} texts were {done} within {limit_s:g} s")
                try:
                    found.append(await call(text))
                except UsageError as error:
                    # What is wrong with all texts is wrong with the first one.
                    if not found:
                        raise
                    raise RequestError(f"input[{len(found)}]: {error.message}", error.remedy, param="input") from error
        await self.good_answers.add()
        return found

    async def _write_logs(self, logs: Iterable[Callable[[], object]]) -> None:
        for log in logs:
            try:
                await self.log_threads.call(log)
            except BusyError as error:
                _LOG.warning("did not log an answer: %s", error)

    def _logs(
        self, request: AnswerRequest, prompt: Prompt, answer: Answer, index: int
    ) -> Sequence[Callable[[], object]]:
        """What logs an adapter's own answer that a row can be made of: to a prompt that is rendered as rows are."""
        name, options = adapter_name(request.adapters), request.options
        if self.log is None or name is None or options.get("raw") or options.get("tool_choice") == "none":
            return ()
        own, shown = answer.replaced or answer, None
        if answer.replaced is not None:
            pairs = [(call.name, call.arguments) for call in answer.tool_calls[: request.max_calls]]
            is_no_answer = answer.instead == ASK or answer.is_cut_off
            shown = "" if is_no_answer else answer_text(answer.content, pairs)
        calls = own.tool_calls[: request.max_calls]
        # Of a call that was cut off there is only the text.
        log = partial(self.log.answered, prompt, own.content if calls else own.content or own.text, calls=calls)
        about: dict[str, Any] = {"adapter": name, "confidence": own.confidence, "shown": shown}
        about |= {"tools": options.get("tools"), "answer_id": answer_id(request.id, index)}
        about |= {"is_cut_off": own.is_cut_off}
        return (partial(log, **about),)

    def _check(self, end_s: float, progress: str) -> None:
        if self._end.is_set():
            raise StoppingError
        if time.monotonic() > end_s:
            # Not 503: clients would send the same texts again.
            raise RequestError(progress, "send fewer texts per request", status=413, param="input")


def answer_id(request_id: str, index: int) -> str:
    """The id of an answer to a request in a log."""
    return f"{request_id}-{index}" if index else request_id


def adapter_name(adapters: Adapters) -> str | None:
    """The name of the only adapter; None for the base and for several."""
    names = [adapters] if isinstance(adapters, str) else list(adapters or ())
    return names[0] if len(names) == 1 else None


def _seconds_until(end_s: float) -> float:
    return max(end_s - time.monotonic(), 1e-3)


def _normalized(values: Sequence[float]) -> list[float]:
    length = sum(value * value for value in values) ** 0.5
    return [value / length for value in values] if length else list(values)
