"""Generate one answer: prefill the prompt, decode token by token, measure the timings."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .serving.context import Context, PromptJob
from .serving.limits import Limits, Stopped
from .serving.pool import Pool
from .states.activation import Spans
from .text.sampling import Sampler, Sampling, sampling_of
from .text.stream import TextStream


@dataclass(frozen=True)
class Timings:
    """Timings of one answer: `switch_us` of the switch alone, `ttft_ms` from the call to the first token.

    `tokens_per_s` is the decode speed after the first token, 0 if there was only one. Of the `prompt_tokens`,
    `reused_tokens` came from a cached state, and `carried_tokens` were computed with other adapters, because a session
    carried its state over. Time spent waiting for other calls does not count. `slow` means that other processes took
    the cores, or that steps took much longer than before.
    """

    switch_us: float
    ttft_ms: float
    tokens_per_s: float
    prompt_tokens: int
    reused_tokens: int
    carried_tokens: int = 0
    slow: bool = False


@dataclass(frozen=True)
class Answer:
    """A generated text of `tokens` tokens.

    `stop_reason` is `end` (of turn), `stop` (a stop text), `length`, `deadline` or `cancelled`; with the last two the
    text is incomplete.
    """

    text: str
    tokens: int
    timings: Timings
    stop_reason: str


@dataclass(frozen=True)
class Call:
    """A prepared call: its pool and job, its system prompt, the time to prepare it, and the tokens carried over."""

    pool: Pool
    job: PromptJob
    system: str | None
    prepared_s: float
    carried: int = 0


@dataclass(frozen=True)
class Carried:
    """Tokens whose state is carried over unchanged: the adapters that computed each span, and the system prompt."""

    tokens: Sequence[int]
    spans: Spans
    system: str | None


@dataclass
class Generation:
    """The result of a generation: the answer, and the tokens of the context's state.

    Separate from the stream, so that deleting the stream ends the generation.
    """

    answer: Answer | None = None
    tokens: list[int] = field(default_factory=list)


class Stream(Iterator[str]):
    """Iterator over the pieces of an answer; afterwards `answer` has all of it. `close` ends the answer early."""

    def __init__(self, pieces: Generator[str, None, None], outcome: Generation) -> None:
        self._pieces = pieces
        self._outcome = outcome

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer | None:
        """The whole answer with its timings; None until the stream is exhausted."""
        return self._outcome.answer

    def read(self) -> Answer:
        """Wait for the whole answer and return it."""
        for _ in self:
            pass
        assert self._outcome.answer is not None
        return self._outcome.answer

    def close(self) -> None:
        """Stop generating and let other calls run."""
        self._pieces.close()


def generate(
    call: Call,
    outcome: Generation,
    *,
    sampling: Sampling | None = None,
    deadline_s: float | None = None,
    cancel: threading.Event | None = None,
    **overrides: object,
) -> Generator[str, None, None]:
    """Yield the pieces of the answer while holding a context; put the whole answer into `outcome`.

    Takes the options of `Runtime.generate`, which are checked immediately.
    """
    return _generate(call, sampling_of(sampling, overrides), Limits(deadline_s, cancel), outcome)


def _generate(call: Call, sampling: Sampling, limits: Limits, outcome: Generation) -> Generator[str, None, None]:
    job = replace(call.job, check=limits.check)
    try:
        with call.pool.lease(job) as context:
            answering = _Answering(call, context, sampling, limits)
            yield from answering.pieces(job)
            outcome.answer, outcome.tokens = answering.answer(), list(context.tokens)
    except Stopped as stopped:
        timings = Timings(0.0, 0.0, 0.0, len(job.tokens), 0, call.carried)
        outcome.answer = Answer("", 0, timings, stopped.reason)


class _Answering:
    """The state of an answer that is being generated."""

    def __init__(self, call: Call, context: Context, sampling: Sampling, limits: Limits) -> None:
        self._call, self._context, self._sampling, self._limits = call, context, sampling, limits
        self._pieces: list[str] = []
        self._count = 0
        self._first_s = self._rest_s = 0.0
        self._reason = ""

    def pieces(self, job: PromptJob) -> Generator[str, None, None]:
        """Prefill the prompt, then decode token by token."""
        context, tokenizer = self._context, self._context.engine.tokenizer
        sampler, text = Sampler(self._sampling), TextStream(self._sampling.stop)
        tick = time.perf_counter()
        self._start = context.run(job)
        logits = self._start.logits
        while True:
            token = sampler.next(logits, context.tokens)
            self._add_time(time.perf_counter() - tick)
            if tokenizer.is_end(token):
                self._reason = "end"
                break
            self._count += 1
            yield from self._push(text.push(tokenizer.piece(token)))
            self._reason = self._reason_to_stop(text)
            if self._reason:
                break
            tick = time.perf_counter()
            try:
                logits = context.extend([token])[0]
            except Stopped as stopped:
                self._reason = stopped.reason
                break
        yield from self._push(text.finish())

    def answer(self) -> Answer:
        """The whole answer, after the last piece."""
        prompt, start = len(self._call.job.tokens), self._start
        steps = len(self._context.tokens) - prompt
        ttft_ms = (self._call.prepared_s + self._first_s) * 1e3
        speed = steps / self._rest_s if steps else 0.0
        timings = Timings(
            switch_us=start.switch_us,
            ttft_ms=ttft_ms,
            tokens_per_s=speed,
            prompt_tokens=prompt,
            reused_tokens=start.reused,
            carried_tokens=self._call.carried,
            slow=self._context.is_slow,
        )
        return Answer("".join(self._pieces), self._count, timings, self._reason)

    def _push(self, piece: str) -> Iterator[str]:
        self._pieces.append(piece)
        if piece:
            yield piece

    def _add_time(self, elapsed_s: float) -> None:
        if self._count:
            self._rest_s += elapsed_s
        else:
            self._first_s = elapsed_s

    def _reason_to_stop(self, text: TextStream) -> str:
        if text.stopped:
            return "stop"
        if self._count == self._sampling.max_tokens or self._context.is_full():
            return "length"
        return self._limits.reason()
