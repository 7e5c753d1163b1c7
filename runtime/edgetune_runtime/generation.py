"""A prepared call in, the answer's pieces and its timings out."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .decoding.drafts import Drafter, DraftTable
from .serving.context import Context, PromptJob
from .serving.limits import Limits, Stopped
from .serving.pool import Pool
from .states.activation import Spans
from .text.sampling import Sampler, Sampling, sampling_of
from .text.stream import TextStream


@dataclass(frozen=True)
class Timings:
    """How long one answer took: `switch_us` is the switch alone, `ttft_ms` all up to the first token.

    `tokens_per_s` is the speed of the tokens after the first, 0 where there were none. Of `prompt_tokens`,
    `reused_tokens` came from an earlier state, and `carried_tokens` stand as other adapters made them, because a
    session was told to carry its state over. Waiting for other calls to end does not count. `slow` says that other
    processes took the cores, or that steps took much longer than they did before.

    After the prompt the answer took `steps` steps; `accepted` of its tokens were drafted (see `decoding.drafts`) and
    verified beside others.
    """

    switch_us: float
    ttft_ms: float
    tokens_per_s: float
    prompt_tokens: int
    reused_tokens: int
    carried_tokens: int = 0
    slow: bool = False
    steps: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens after the first for each step, 0 where there was none."""
        return (self.steps + self.accepted) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Answer:
    """A generated text of `tokens` tokens.

    `stop_reason` is `end` (of turn), `stop` (text), `length`, `deadline`, or `cancelled`; with the last two the text is
    what there was until then.
    """

    text: str
    tokens: int
    timings: Timings
    stop_reason: str


@dataclass(frozen=True)
class Call:
    """One call made ready: where it runs, what on, its system prompt, how long that took, and how much is carried."""

    pool: Pool
    job: PromptJob
    system: str | None
    prepared_s: float
    carried: int = 0
    drafts: DraftTable | None = None


@dataclass(frozen=True)
class Carried:
    """Tokens whose state is to stand as it is: which adapters acted where, and the system prompt at their beginning."""

    tokens: Sequence[int]
    spans: Spans
    system: str | None


@dataclass
class Generation:
    """Where a generation leaves its answer and the tokens whose state there is then.

    It is apart from the stream, so that dropping the stream ends the generation.
    """

    answer: Answer | None = None
    tokens: list[int] = field(default_factory=list)


class Stream(Iterator[str]):
    """Pieces of an answer as they come; `answer` is there once they are exhausted. `close` ends it early."""

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
        """The whole answer, once it is there."""
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
    """The answer's pieces, yielded while holding a context; the whole answer is left in `outcome`.

    Options as those of `Runtime.generate`, which are checked at once.
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
    """One answer as it comes into being."""

    def __init__(self, call: Call, context: Context, sampling: Sampling, limits: Limits) -> None:
        self._call, self._context, self._sampling, self._limits = call, context, sampling, limits
        self._pieces: list[str] = []
        self._count = self._steps = self._accepted = 0
        self._first_s = self._rest_s = 0.0
        self._reason = ""
        self._sampler, self._text = Sampler(sampling), TextStream(sampling.stop)

    def pieces(self, job: PromptJob) -> Generator[str, None, None]:
        """Compute the prompt, then choose tokens, several in a step where a draft of them is right."""
        context, prompt = self._context, len(job.tokens)
        tick = time.perf_counter()
        self._start = context.run(job)
        drafter = None if self._call.drafts is None else Drafter(self._call.drafts, list(job.tokens))
        chosen = [self._sampler.next(self._start.logits, context.tokens)]
        self._first_s = time.perf_counter() - tick
        while True:
            yield from self._emit(chosen)
            if self._reason:
                break
            tick = time.perf_counter()
            if drafter is not None:
                drafter.add(chosen)
            try:
                chosen = self._step(chosen[-1], drafter)
            except Stopped as stopped:
                self._reason = stopped.reason
                break
            self._rest_s += time.perf_counter() - tick
        # What was drafted beyond the end is no part of the answer.
        context.truncate(prompt + self._count)
        yield from self._push(self._text.finish())

    def _step(self, token: int, drafter: Drafter | None) -> list[int]:
        """Compute `token`, which was chosen, and a draft behind it; the tokens of the draft that stand, and one more."""
        context = self._context
        draft, chances = self._draft(drafter)
        rows = context.extend([token, *draft])
        known, chosen = len(context.tokens) - len(draft), list[int]()
        for row, drafted in zip(rows, [*draft, None], strict=True):
            chosen.append(self._sampler.next(row, context.tokens[: known + len(chosen)]))
            if chosen[-1] != drafted:
                break
        accepted = len(chosen) - 1
        context.truncate(known + accepted)
        if drafter is not None and draft:
            drafter.learn(chances, accepted)
        self._steps, self._accepted = self._steps + 1, self._accepted + accepted
        return chosen

    def _draft(self, drafter: Drafter | None) -> tuple[list[int], list[float]]:
        """Tokens that are worth verifying in the next step, and their chances."""
        if drafter is None:
            return [], []
        context = self._context
        # Each step gives one token beyond its draft.
        limit = min(self._sampling.max_tokens - self._count, context.most_tokens - len(context.tokens)) - 1
        draft, chances = drafter.propose(limit)
        count = context.batch_cost.worthwhile(chances)
        return draft[:count], chances[:count]

    def _emit(self, tokens: Sequence[int]) -> Iterator[str]:
        """The pieces of chosen tokens, up to one that ends the answer."""
        tokenizer = self._context.engine.tokenizer
        for token in tokens:
            if tokenizer.is_end(token):
                self._reason = "end"
                return
            self._count += 1
            yield from self._push(self._text.push(tokenizer.piece(token)))
            self._reason = self._reason_to_stop()
            if self._reason:
                return

    def answer(self) -> Answer:
        """The whole answer, once all pieces are there."""
        prompt, start = len(self._call.job.tokens), self._start
        ttft_ms = (self._call.prepared_s + self._first_s) * 1e3
        speed = (self._steps + self._accepted) / self._rest_s if self._steps else 0.0
        timings = Timings(
            switch_us=start.switch_us,
            ttft_ms=ttft_ms,
            tokens_per_s=speed,
            prompt_tokens=prompt,
            reused_tokens=start.reused,
            carried_tokens=self._call.carried,
            slow=self._context.is_slow,
            steps=self._steps,
            accepted=self._accepted,
        )
        return Answer("".join(self._pieces), self._count, timings, self._reason)

    def _push(self, piece: str) -> Iterator[str]:
        self._pieces.append(piece)
        if piece:
            yield piece

    def _reason_to_stop(self) -> str:
        if self._text.stopped:
            return "stop"
        # To go on, the last token has to be computed.
        is_full = len(self._call.job.tokens) + self._count > self._context.most_tokens
        if self._count == self._sampling.max_tokens or is_full:
            return "length"
        return self._limits.reason()
