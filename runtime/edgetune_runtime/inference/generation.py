"""Generate one answer: prefill the prompt, decode token by token, measure the timings."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate

from edgetune_runtime.decoding.drafts import EMPTY, Drafter
from edgetune_runtime.decoding.logprobs import LogprobRecord
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.limits import CallLimits, Stopped
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.jobs import PromptJob
from edgetune_runtime.text.sampling import REPEAT_WINDOW, Sampler, Sampling, sampling_of
from edgetune_runtime.text.stream import TextStream

from .answer import COMPLETE, Answer, Outcome, Timings
from .call import Call
from .classification import Classification, LabelChoice
from .confidence import confidence, kind_of, log_chance, log_odds

_WHOLE = ("end", "stop", "length")
"""Reasons to stop that the next answer to the prompt will have too."""
_MAX_HELD = 64
"""Forced tokens whose log-probabilities are computed in one step; with a vocabulary of 150,000 a row takes 0.6 MB."""


def generate(
    call: Call,
    outcome: Outcome,
    limits: CallLimits,
    *,
    sampling: Sampling | None = None,
    logprobs: int | None = None,
    **overrides: object,
) -> Generator[str, None, None]:
    """Yield the pieces of the answer while holding a context; put the whole answer into `outcome`.

    Takes the options of `Runtime.generate` without those of `split_options`; they are checked immediately.
    """
    record = None if logprobs is None else LogprobRecord(logprobs)
    return _generate(call, sampling_of(sampling, overrides), limits, record, outcome)


def _generate(
    call: Call, sampling: Sampling, limits: CallLimits, record: LogprobRecord | None, outcome: Outcome
) -> Generator[str, None, None]:
    job = replace(call.job, check=limits.check)
    try:
        if call.stopped:
            raise Stopped(call.stopped)
        with call.lease(job) as context:
            answering = _Answering(call, context, sampling, limits, record)
            for piece in answering.pieces(job):
                context.suspend()
                yield piece
                context.resume()
            outcome.answer, outcome.tokens = answering.answer(), list(context.tokens)
    except Stopped as stopped:
        timings = Timings(0.0, 0.0, 0.0, len(job.tokens), 0, call.carried)
        logprobs = None if record is None else ()
        outcome.answer = Answer("", 0, timings, stopped.reason, call.output, logprobs, route=call.route)


class _Answering:
    """The state of an answer that is being generated."""

    def __init__(
        self, call: Call, context: Context, sampling: Sampling, limits: CallLimits, record: LogprobRecord | None
    ) -> None:
        self._call, self._context, self._sampling, self._limits = call, context, sampling, limits
        self._sampler, self._text = Sampler(sampling), TextStream(sampling.stop)
        self._constraint, self._reader = call.constraint, call.reader
        self._content = None if call.reader is None else call.reader.stream()
        # Control tokens have no text, but calls may begin with one.
        self._marks = {} if call.reader is None else call.reader.marks
        self._drafter: Drafter | None = None
        self._found: Classification | None = None
        self._record = record
        self._pending: list[int] = []
        self._held: list[int] = []
        self._pieces: list[str] = []
        self._log_chances: list[float | None] = []
        self._count = self._steps = self._drafted = self._accepted = self._forced = self._after_first = 0
        self._first_s = self._rest_s = 0.0
        self._reason = self._reason_at_end = ""

    def pieces(self, job: PromptJob) -> Generator[str, None, None]:
        """Prefill the prompt, then decode: several tokens per step where they are forced or a draft is right."""
        context = self._context
        tick = time.perf_counter()
        self._start = context.run(job)
        # To continue, the last token must fit too.
        self._max_tokens = min(self._sampling.max_tokens, context.max_tokens - len(job.tokens) + 1)
        yield from self._written(job, tick) if self._call.labels is None else self._label(self._call.labels, tick)
        # Tokens computed beyond the end are not part of the answer. A cut may compute some again, which the limit that
        # ended the answer stops.
        with suppress(Stopped):
            context.truncate(len(job.tokens) + self._count)
        yield from self._push(self._text.finish())
        if self._content is not None:
            yield from filter(None, [self._content.finish(is_cut_off=self._reason not in COMPLETE)])

    def _label(self, choice: LabelChoice, begin: float) -> Generator[str, None, None]:
        """The label that is chosen, whatever the sampling is."""
        context, first = self._context, self._start.logits
        self._found = choice.of(context, first, self._call.curves)
        tokens = choice.path_of(self._found.label)
        if self._record is not None:
            rows = [first, *context.extend(tokens[:-1])] if tokens[:-1] else [first]
            self._record.add(context.engine.tokenizer, rows, tokens)
        self._first_s, self._after_first = time.perf_counter() - begin, len(tokens) - 1
        yield from self._emit(tokens)
        if self._reason != "stop" and self._count == len(tokens):
            self._reason = "end"

    def _written(self, job: PromptJob, begin: float) -> Generator[str, None, None]:
        """An answer that is written token by token."""
        drafts, past = None if self._call.drafts is None else self._call.drafts(), self._call.past
        if drafts is not None or past is not None:
            self._drafter = Drafter(drafts or EMPTY, list(job.tokens), () if past is None else past.tokens)
        chosen = self._choose(self._start.logits[None], [])
        self._first_s, self._after_first = time.perf_counter() - begin, len(chosen) - 1
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
        if self._drafter is not None and self._call.past is not None and self._reason in _WHOLE:
            self._call.past.keep(self._drafter.answer[: self._count])

    def answer(self) -> Answer:
        """The whole answer, after the last piece."""
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
            drafted=self._drafted,
        )
        text = "".join(self._pieces)
        is_cut_off = self._reason not in COMPLETE
        content, calls = (text, ()) if self._reader is None else self._reader.read(text, is_cut_off=is_cut_off)
        logprobs = None if self._record is None else tuple(self._record.tokens[: self._count])
        output = self._call.output
        answer = Answer(text, self._count, timings, self._reason, output, logprobs, calls, content, self._call.route)
        return answer if answer.is_cut_off or self._is_stopped_within_form(text) else self._with_confidence(answer)

    def _is_stopped_within_form(self, text: str) -> bool:
        """Whether a stop text came after this text, where the output constraint, or the label, wanted more."""
        if self._reason != "stop":
            return False
        if self._constraint is None:
            return self._found is not None
        # The stop text, which is no part of the answer, may have begun in an earlier token than the last.
        size = len(text.encode())
        ends = accumulate(len(self._piece(token)) for token in self._constraint.tokens[: self._count])
        return not self._constraint.may_end_after(sum(end <= size for end in ends))

    def _with_confidence(self, answer: Answer) -> Answer:
        if self._found is not None:
            found = self._found
            return replace(answer, kind=found.kind, log_odds=found.log_odds, confidence=found.confidence)
        expects_calls = self._reader is not None and not self._call.answers_tool
        kind = kind_of(answer.text, answer.output, calls=len(answer.tool_calls), expects_calls=expects_calls)
        # The end token was a choice too; drafted tokens after a stop text were not.
        odds = log_odds(self._log_chances[: self._count + (self._reason == "end")])
        return replace(answer, kind=kind, log_odds=odds, confidence=confidence(self._call.curves, kind, odds))

    def _step(self) -> list[int]:
        """Decode the pending tokens and a draft of the next ones; returns the tokens that follow."""
        context, held = self._context, self._held
        draft, chances = self._draft()
        filler = self._filler(len(self._pending) + len(draft))
        rows = context.extend([*self._pending, *draft, *filler], last=len(held) + len(draft) + len(filler) + 1)
        if filler:
            rows = rows[: -len(filler)]
            context.truncate(len(context.tokens) - len(filler))
        if self._record is not None:
            self._record.add(context.engine.tokenizer, rows[: len(held)], held)
        chosen = held + self._choose(rows[len(held) :], draft)
        self._steps += 1
        if self._drafter is not None and draft:
            self._drafter.learn(chances, self._hits)
        context.truncate(len(context.tokens) - len(draft) + self._hits)
        return chosen

    def _choose(self, rows: Logits, draft: Sequence[int]) -> list[int]:
        """Choose a token from each row of logits, up to the first that differs from the draft, then append forced ones.

        The last chosen token and the forced ones are not computed yet: they are pending. Where log-probabilities are
        recorded, the forced ones are held back until the next step gives theirs.
        """
        computed = len(self._context.tokens) - len(draft)
        chosen: list[int] = []
        self._hits = 0
        for row, drafted in zip(rows, [*draft, None], strict=True):
            token = self._token(row, computed + len(chosen))
            if token is None:
                self._pending, self._reason_at_end = [], "dead_end"
                break
            chosen.append(token)
            if self._constraint is not None:
                self._constraint.accept(token)
            if token != drafted:
                self._pending = [token]
                break
            self._hits += 1
        self._drafted += len(draft)
        self._accepted += self._hits
        forced = self._forced_after(computed + len(chosen))
        self._pending = self._pending + forced
        self._log_chances += [None] * len(forced)
        if self._drafter is not None:
            self._drafter.add(chosen + forced)
        if self._record is None:
            return chosen + forced
        self._record.add(self._context.engine.tokenizer, rows[: len(chosen)], chosen)
        self._held = forced
        return chosen

    def _forced_after(self, length: int) -> list[int]:
        """Accept the forced tokens after `length` ones of prompt and answer, as many as the answer has room for."""
        if self._constraint is None or not self._pending or self._context.engine.tokenizer.is_end(self._pending[0]):
            return []
        room = len(self._call.job.tokens) + self._max_tokens - length
        if self._record is not None:
            # Tokens that are held back are computed, so the last one of a full context cannot be among them.
            room = min(room - 1, _MAX_HELD)
        forced = self._constraint.forced()[: max(0, room)]
        self._constraint.accept(*forced)
        self._forced += len(forced)
        return forced

    def _token(self, row: Logits, computed: int) -> int | None:
        """The token for the place after `computed` tokens; None where the output constraint allows none."""
        constraint = self._constraint
        if constraint is not None and constraint.is_complete:
            return None
        forced = [] if constraint is None else constraint.forced()
        # Without a draw, so that a seed gives the same answer however many tokens a step has.
        token = forced[0] if forced else self._chosen(row, computed)
        if token is not None:
            self._log_chances.append(None if forced else log_chance(row, token))
        return token

    def _chosen(self, row: Logits, computed: int) -> int | None:
        """The token chosen from logits where there is a choice."""
        constraint, sampling = self._constraint, self._sampling
        if constraint is not None and sampling.temperature == 0 and sampling.repeat_penalty == 1:
            return constraint.best(row)
        allowed = row if constraint is None else constraint.mask(row)
        recent = self._context.tokens[max(0, computed - REPEAT_WINDOW) : computed]
        return None if allowed is None else self._sampler.next(allowed, recent)

    def _draft(self) -> tuple[list[int], list[float]]:
        """Drafted tokens that are worth verifying in the next step, and their probabilities."""
        if self._drafter is None:
            return [], []
        context = self._context
        # A step gives one token more than its draft.
        room = self._max_tokens - self._count - len(self._held) - 1
        # No draft reaches the last place of a context, where a single token has no room for a filler.
        room = min(room, context.max_tokens - len(context.tokens) - len(self._pending) - (context.least_rows - 1))
        rollback = context.engine.max_rollback
        draft, chances = self._drafter.propose(max(0, room if rollback is None else min(room, rollback)))
        if self._constraint is not None:
            draft = draft[: self._constraint.valid_prefix(draft)]
        count = context.batch_cost.worthwhile(chances[: len(draft)], len(self._pending))
        return draft[:count], chances[:count]

    def _filler(self, tokens: int) -> list[int]:
        """Tokens that a step of so many ones computes besides, to round like longer steps, as far as they fit.

        None where no step of such a call has more than one, whether the bundle was opened with drafts or not.
        """
        call, context = self._call, self._context
        if call.drafts is None and call.past is None and self._constraint is None:
            return []
        room = context.max_tokens - len(context.tokens) - tokens
        return self._pending[-1:] * max(0, min(context.least_rows - tokens, room))

    def _emit(self, tokens: Sequence[int]) -> Iterator[str]:
        """The text pieces of chosen tokens, up to one that ends the answer."""
        tokenizer = self._context.engine.tokenizer
        for token in tokens:
            if tokenizer.is_end(token):
                self._reason = "end"
                return
            self._count += 1
            yield from self._push(self._text.push(self._piece(token)))
            self._reason = self._reason_to_stop()
            if self._reason:
                break
        # None is chosen beyond `length`, so the constraint has accepted the tokens up to here and no more.
        is_at_end = self._reason in ("", "length") and not self._held
        if is_at_end and self._constraint is not None and self._constraint.is_complete:
            self._reason = "end"
        self._reason = self._reason or self._reason_at_end

    def _piece(self, token: int) -> bytes:
        return self._marks.get(token) or self._context.engine.tokenizer.piece(token)

    def _push(self, piece: str) -> Iterator[str]:
        self._pieces.append(piece)
        shown = piece if self._content is None else self._content.push(piece)
        if shown:
            yield shown

    def _reason_to_stop(self) -> str:
        if self._text.stopped:
            return "stop"
        if self._count == self._max_tokens:
            return "length"
        # What is left of a label that was found takes no time.
        return self._limits.reason() if self._found is None else ""
