"""A prepared call in, the answer's pieces and its timings out."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .decoding.constraint import Constraint
from .decoding.drafts import Drafter, DraftTable
from .decoding.output import OutputSpec
from .engines.base import Logits
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

    A step after the prompt gave `tokens_per_step` tokens. `accepted` of them were drafted (see `decoding.drafts`), and
    `forced` ones the only ones that the answer's form allowed.
    """

    switch_us: float
    ttft_ms: float
    tokens_per_s: float
    prompt_tokens: int
    reused_tokens: int
    carried_tokens: int = 0
    slow: bool = False
    tokens_per_step: float = 0.0
    forced: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated text of `tokens` tokens.

    `stop_reason` is `end` (of turn), `stop` (text), `length`, `deadline`, `cancelled`, or `dead_end`, where no token
    fits the form that the answer was held to (`output`); with the last four the text is what there was until then.
    """

    text: str
    tokens: int
    timings: Timings
    stop_reason: str
    output: OutputSpec | None = None

    @property
    def parsed(self) -> Any:  # noqa: ANN401 - whatever the schema describes
        """The object that the answer stands for; the text itself if it was not held to a schema.

        VerificationError when it ended too early to be one, or a pydantic model refuses it.
        """
        return self.text if self.output is None else self.output.parse(self.text)


@dataclass(frozen=True)
class Call:
    """One call made ready: where it runs, what on, its system prompt, how long that took, and how much is carried."""

    pool: Pool
    job: PromptJob
    system: str | None
    prepared_s: float
    carried: int = 0
    drafts: DraftTable | None = None
    output: OutputSpec | None = None
    constraint: Constraint | None = None


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
    """One answer in the making."""

    def __init__(self, call: Call, context: Context, sampling: Sampling, limits: Limits) -> None:
        self._call, self._context, self._sampling, self._limits = call, context, sampling, limits
        self._sampler, self._text = Sampler(sampling), TextStream(sampling.stop)
        self._constraint = call.constraint
        self._drafter: Drafter | None = None
        self._pending: list[int] = []
        self._pieces: list[str] = []
        self._count = self._steps = self._accepted = self._forced = self._after_first = 0
        self._first_s = self._rest_s = 0.0
        self._reason = self._reason_at_end = ""

    def pieces(self, job: PromptJob) -> Generator[str, None, None]:
        """Compute the prompt, then choose tokens: several in a step where they are forced, or drafted rightly."""
        context = self._context
        tick = time.perf_counter()
        self._start = context.run(job)
        if self._call.drafts is not None:
            self._drafter = Drafter(self._call.drafts, list(job.tokens))
        chosen = self._choose([self._start.logits], [])
        self._first_s, self._after_first = time.perf_counter() - tick, len(chosen) - 1
        while True:
            yield from self._emit(chosen)
            if self._reason:
                break
            tick = time.perf_counter()
            try:
                chosen = self._step()
            except Stopped as stopped:
                self._reason = stopped.reason
                break
            self._rest_s += time.perf_counter() - tick
            self._after_first += len(chosen)
        # What was computed beyond the end is no part of the answer.
        context.truncate(len(job.tokens) + self._count)
        yield from self._push(self._text.finish())

    def answer(self) -> Answer:
        """The whole answer, once all pieces are there."""
        start = self._start
        timings = Timings(
            switch_us=start.switch_us,
            ttft_ms=(self._call.prepared_s + self._first_s) * 1e3,
            tokens_per_s=self._after_first / self._rest_s if self._steps else 0.0,
            prompt_tokens=len(self._call.job.tokens),
            reused_tokens=start.reused,
            carried_tokens=self._call.carried,
            slow=self._context.is_slow,
            tokens_per_step=self._after_first / self._steps if self._steps else 0.0,
            forced=self._forced,
            accepted=self._accepted,
        )
        return Answer("".join(self._pieces), self._count, timings, self._reason, self._call.output)

    def _step(self) -> list[int]:
        """Compute the pending tokens and a draft behind them; the tokens that follow."""
        context = self._context
        draft, chances = self._draft()
        rows = context.extend([*self._pending, *draft], last=len(draft) + 1)
        chosen = self._choose(rows, draft)
        self._steps += 1
        if self._drafter is not None and draft:
            self._drafter.learn(chances, self._rightly)
        context.truncate(len(context.tokens) - len(draft) + self._rightly)
        return chosen

    def _choose(self, rows: Sequence[Logits], draft: Sequence[int]) -> list[int]:
        """The tokens after each row of logits up to the first that was not drafted, and those that it forces.

        All but the drafted ones are still to be computed: they are pending.
        """
        known = len(self._context.tokens) - len(draft)
        chosen: list[int] = []
        self._rightly = 0
        for row, drafted in zip(rows, [*draft, None], strict=True):
            allowed = row if self._constraint is None else self._constraint.mask(row)
            if allowed is None:
                self._pending = []
                self._reason_at_end = "dead_end"
                break
            token = self._sampler.next(allowed, self._context.tokens[: known + len(chosen)])
            chosen.append(token)
            if self._constraint is not None:
                self._constraint.accept(token)
            if token != drafted:
                self._pending = [token]
                break
            self._rightly += 1
        self._accepted += self._rightly
        if self._constraint is not None and self._pending and not self._is_end(self._pending[0]):
            forced = self._constraint.forced()
            self._constraint.accept(*forced)
            self._pending, chosen, self._forced = self._pending + forced, chosen + forced, self._forced + len(forced)
        if self._drafter is not None:
            self._drafter.add(chosen)
        return chosen

    def _draft(self) -> tuple[list[int], list[float]]:
        """Tokens that are worth verifying in the next step, and their chances."""
        if self._drafter is None:
            return [], []
        context, pending = self._context, len(self._pending)
        # Each step gives one token beyond its draft.
        limit = min(self._sampling.max_tokens - self._count - 1, context.most_tokens - len(context.tokens) - pending)
        draft, chances = self._drafter.propose(limit)
        if self._constraint is not None:
            draft = draft[: self._constraint.valid_prefix(draft)]
        count = context.batch_cost.worthwhile(chances[: len(draft)], pending)
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
        if self._constraint is not None and self._constraint.is_complete:
            self._reason = "end"
        self._reason = self._reason or self._reason_at_end

    def _is_end(self, token: int) -> bool:
        return self._context.engine.tokenizer.is_end(token)

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
