"""The records of an answer (text, tool calls, confidence, timings), and the stream of its pieces."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Any

from edgetune_runtime.decoding.logprobs import TokenLogprob
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError
from edgetune_runtime.tools.calls import ToolCall

from .lifetime import Lifetime
from .routing.router import Route

COMPLETE = ("end", "stop")
"""Reasons to stop of an answer that is complete: the end of the turn, or a stop text."""
CLOSED_EARLY = ("the stream was closed before its end", "read it to its end first")
"""Message and remedy of the UsageError for a stream that has no answer."""
STILL_OPEN = ("a stream of this session is still open", "read it to its end or close it first")
"""The same for a session that is used while it has a stream."""


@dataclass(frozen=True)
class Timings:
    """Timings of one answer: `switch_us` of the switch alone, `ttft_ms` from the call to the first token.

    `tokens_per_s` is the decode speed after the first token, 0 if there was only one. Of the `prompt_tokens`,
    `reused_tokens` came from a cached state, and `carried_tokens` were computed with other adapters, because a session
    carried its state over. Time spent waiting for other calls does not count. `slow` means that other processes took
    the cores, or that steps took much longer than before.

    `tokens_per_step` is the mean number of tokens per step after the prompt. Steps verified `drafted` tokens (see
    `decoding.drafts`), and `accepted` of them were right; `forced` tokens were the only ones that the output constraint
    allowed.
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
    drafted: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated text of `tokens` tokens, which are those of the bundle's tokenizer whatever answered.

    With `tools`, `text` is all that the model wrote, `tool_calls` are the calls in it, and `content` is the text before
    them. A call that was cut off is in `text` only.

    `stop_reason` is `end` (of turn), `stop` (a stop text), `length`, `deadline`, `cancelled`, or `dead_end` where no
    token satisfies the output constraint; with the last three the text is incomplete. `output` is that constraint.
    `logprobs` has one entry per token if requested; the end token is not part of the answer. `route` is the choice of
    the router if the adapter was `auto`.

    `confidence` is the probability that the answer is right, from the curve that the build fitted for answers of this
    `kind` (`value`, `choice`, `label`, `nothing` or `question`). It is made from `log_odds`: the model's own log odds
    that a token is the chosen one rather than the best other one, for the geometric mean of these chances over the
    tokens that the output constraint did not force; for a label, those of its `Classification`. All three are None for
    an incomplete answer, as is one that a stop text ended where the constraint, or the label, wanted more, and
    `confidence` where there is no curve: for the base, several adapters, another scale, a raw prompt, a constraint of
    the call's own, and kinds that too few validation rows had.

    With `min_confidence`, of the call or the recipe, `is_unsure` says whether the confidence is lower, or not known.
    `instead` is what answered in place of the unsure answer `replaced`, whose confidence is kept: `ask`, `base`, an
    adapter, `defer`, or None.
    """

    text: str
    tokens: int
    timings: Timings
    stop_reason: str
    output: OutputSpec | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""
    route: Route | None = None
    confidence: float | None = None
    kind: str | None = None
    log_odds: float | None = None
    is_unsure: bool = False
    instead: str | None = None
    replaced: Answer | None = None

    @property
    def is_cut_off(self) -> bool:
        """Whether the text is incomplete."""
        return self.stop_reason not in COMPLETE

    @property
    def was_stopped(self) -> bool:
        """Whether the caller or a deadline ended it."""
        return self.stop_reason in ("deadline", "cancelled")

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a chat message: the assistant's `content`, and its `tool_calls` if there are any."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return message | ({"tool_calls": [call.to_message() for call in self.tool_calls]} if self.tool_calls else {})

    @property
    def parsed(self) -> Any:  # noqa: ANN401 - whatever the schema describes
        """The answer as an object; the text itself without a schema, and None if it calls tools beside one.

        VerificationError if the answer ended too early to parse, or a pydantic model rejects it.
        """
        if self.output is None:
            return self.text
        return None if self.tool_calls else self.output.parse(self.text)


@dataclass
class Outcome:
    """The result of a generation: the answer, and the tokens of the context's state.

    Separate from the stream, so that deleting the stream ends the generation.
    """

    answer: Answer | None = None
    tokens: list[int] = field(default_factory=list)


class Stream(Iterator[str], AbstractContextManager["Stream"]):
    """Iterator over the pieces of an answer without its tool calls; afterwards `answer` has all of it.

    `close`, and leaving its `with` block, end the answer early. While a thread reads it, that of another thread is a
    UsageError, and so is reading. A process that was forked meanwhile cannot read on.
    """

    def __init__(self, pieces: Generator[str, None, None], outcome: Outcome) -> None:
        self._pieces = pieces
        self._outcome = outcome
        self._lifetime = Lifetime()
        self._lock = threading.Lock()

    def __next__(self) -> str:
        self._lifetime.check()
        with self._alone():
            return next(self._pieces)

    @property
    def answer(self) -> Answer | None:
        """The whole answer with its timings; None until the stream is exhausted."""
        return self._outcome.answer

    def read(self) -> Answer:
        """Wait for the whole answer and return it; UsageError if the stream was closed before its end."""
        for _ in self:
            pass
        if self._outcome.answer is None:
            raise UsageError(*CLOSED_EARLY)
        return self._outcome.answer

    def close(self) -> None:
        """Stop generating and let other calls run."""
        with self._alone():
            self._pieces.close()

    @property
    def _is_open(self) -> bool:
        """Whether it has neither ended nor been closed."""
        return getgeneratorstate(self._pieces) != GEN_CLOSED

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise UsageError("another thread is reading this stream", "set its `cancel` to end it from other threads")
        try:
            yield
        finally:
            self._lock.release()

    def __exit__(self, *_error: object) -> None:
        self.close()
