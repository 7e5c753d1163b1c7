"""A prepared call in, the answer's pieces and its timings out."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

from .sampling import Sampler, Sampling
from .session import Session
from .text import TextStream


@dataclass(frozen=True)
class Timings:
    """How long one answer took: `switch_us` is the switch alone, `ttft_ms` all up to the first token.

    `tokens_per_s` is the speed of the tokens after the first, 0 where there were none. Of `prompt_tokens`,
    `reused_tokens` came from an earlier state. Waiting for other calls to end does not count.
    """

    switch_us: float
    ttft_ms: float
    tokens_per_s: float
    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Answer:
    """A generated text of `tokens` tokens; `stop_reason` is `end` (of turn), `stop` (text) or `length`."""

    text: str
    tokens: int
    timings: Timings
    stop_reason: str


@dataclass(frozen=True)
class Call:
    """One call made ready: where it runs, with which adapters, on which tokens, and how long that took."""

    session: Session
    adapters: Mapping[str, float]
    tokens: list[int]
    prepared_s: float


@dataclass
class Outcome:
    """Where a generation leaves its answer; apart from the stream, so that dropping the stream ends the generation."""

    answer: Answer | None = None


class Stream(Iterator[str]):
    """Pieces of an answer as they come; `answer` is there once they are exhausted. `close` ends it early."""

    def __init__(self, pieces: Generator[str, None, None], outcome: Outcome) -> None:
        self._pieces = pieces
        self._outcome = outcome

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer | None:
        """The whole answer with its timings; None until the stream is exhausted."""
        return self._outcome.answer

    def close(self) -> None:
        """Stop generating and let other calls run."""
        self._pieces.close()


def generate(call: Call, sampling: Sampling, outcome: Outcome) -> Generator[str, None, None]:
    """Yield the answer's pieces while holding the session, then leave the whole answer in `outcome`."""
    session, tokenizer = call.session, call.session.engine.tokenizer
    sampler, text = Sampler(sampling), TextStream(sampling.stop)
    pieces: list[str] = []
    count, first_s, rest_s, reason = 0, 0.0, 0.0, ""
    with session.hold():
        tick = time.perf_counter()
        start = session.start(call.adapters, call.tokens)
        logits = start.logits
        while not reason:
            token = sampler.next(logits, session.tokens)
            elapsed_s = time.perf_counter() - tick
            first_s, rest_s = (first_s, rest_s + elapsed_s) if count else (elapsed_s, 0.0)
            if tokenizer.is_end(token):
                reason = "end"
                break
            count += 1
            pieces.append(text.push(tokenizer.piece(token)))
            if pieces[-1]:
                yield pieces[-1]
            if text.stopped:
                reason = "stop"
            elif count == sampling.max_tokens or session.is_full():
                reason = "length"
            else:
                tick = time.perf_counter()
                logits = session.extend([token])[0]
        pieces.append(text.finish())
        if pieces[-1]:
            yield pieces[-1]
        steps = len(session.tokens) - len(call.tokens)
    ttft_ms = (call.prepared_s + first_s) * 1e3
    speed = steps / rest_s if steps else 0.0
    timings = Timings(start.switch_us, ttft_ms, speed, len(call.tokens), start.reused)
    outcome.answer = Answer("".join(pieces), count, timings, reason)
