"""Applies the rule for unsure answers: marks one, or lets something else answer in its place."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgetune_runtime.bundle import ASK, BASE, DEFER, ERROR, MARK, UnsureRule
from edgetune_runtime.decoding.output import spec_of
from edgetune_runtime.errors import EdgetuneError, UnsureError, UsageError
from edgetune_runtime.limits import CallLimits, Stopped
from edgetune_runtime.text.chat import Prompt, messages_for
from edgetune_runtime.text.sampling import sampling_of
from edgetune_runtime.tools.calls import answer_text
from edgetune_runtime.wording import suggestion

from .answer import Answer, Outcome
from .call import Call
from .confidence import QUESTION, Curves
from .deferring import DeferError, DeferTo, ask
from .generation import generate
from .loaded import LoadedBundle
from .options import AnswerForm

_LOG = logging.getLogger(__name__)
_HAS_CONFIDENCE = "use one adapter whose build had enough validation rows, with its own scale, output and labels"


@dataclass(frozen=True)
class AnswerCall:
    """A prepared call with what it was prepared from, so that something else can answer the same prompt."""

    call: Call
    prompt: Prompt
    form: AnswerForm
    limits: CallLimits
    options: Mapping[str, Any]

    def generate(self, outcome: Outcome) -> Generator[str, None, None]:
        """The pieces of the answer; see `generation.generate`."""
        return generate(self.call, outcome, self.limits, **self.options)


def answer_pieces(
    loaded: LoadedBundle, answer_call: AnswerCall, outcome: Outcome, options: Mapping[str, Any]
) -> Generator[str, None, None]:
    """The pieces of an answer, or of what the rule of the options, or of the adapter, puts in place of an unsure one.

    With a rule that does more than mark, no piece comes before the whole answer.
    """
    pieces, rule = answer_call.generate(outcome), rule_of(loaded, answer_call.call, options)
    return pieces if rule is None else _Settling(loaded, answer_call, outcome, rule).pieces(pieces)


def rule_of(loaded: LoadedBundle, call: Call, options: Mapping[str, Any]) -> UnsureRule | None:
    """The rule of a call; UsageError for an invalid value, and for a call whose answers have no confidence."""
    min_confidence, unsure, question = (options.get(name) for name in ("min_confidence", "unsure", "ask"))
    then = _checked(loaded, unsure, question)
    check_min_confidence(min_confidence)
    if call.route is not None and not call.route.is_known:
        return None
    name, entry = next(iter(call.entries.items()), (None, None))
    own = None if entry is None else entry.unsure
    if call.stopped:
        # Whether it has curves is not known, and nothing answers in its place.
        return own if min_confidence is None else UnsureRule(min_confidence)
    rule = own if call.curves else None
    if min_confidence is not None:
        rule = replace(rule or UnsureRule(min_confidence), min_confidence=min_confidence)
    # Whoever is routed does not know which adapter answers, and which of them have a confidence.
    if call.route is None:
        require_curves(min_confidence, call.curves)
        _check_counts(then, name, rule, call.curves)
    elif then == name:
        then = MARK
    if rule is None:
        return None
    rule = replace(rule, then=then or rule.then, question=question or rule.question)
    if then == ASK and not rule.question:
        raise UsageError("unsure is 'ask', but there is no question", "give its text as ask")
    return rule


def _checked(loaded: LoadedBundle, unsure: object, question: object) -> str | None:
    """What the options say that becomes of unsure answers, if anything."""
    if question is not None:
        if unsure not in (None, ASK):
            raise UsageError(f"unsure is {unsure!r}, and ask is given too", "give one of them")
        if not isinstance(question, str) or not question:
            raise UsageError(f"ask is {question!r}", "give the text of a question")
        return ASK
    if unsure is None or unsure in (MARK, ASK, BASE, ERROR):
        return None if unsure is None else str(unsure)
    if unsure == DEFER:
        if loaded.options.defer_to is None:
            message = "unsure is 'defer', but there is no address to defer to"
            raise UsageError(message, "open the bundle with defer_to (--defer-to)")
        return DEFER
    if isinstance(unsure, str) and (unsure in loaded.manifest.adapters or loaded.replaced.any_of((unsure,))):
        return unsure
    names = (MARK, ASK, BASE, ERROR, DEFER, *loaded.manifest.adapters)
    raise UsageError(f"unsure is {unsure!r}", suggestion(str(unsure), names))


def _check_counts(then: str | None, adapter: str | None, rule: UnsureRule | None, curves: Curves) -> None:
    """UsageError for `unsure` where it can do nothing."""
    if then is None or then == MARK:
        return
    if then == adapter:
        raise UsageError(f"unsure is {then!r}, which is the unsure adapter itself", "name another one, or base")
    if rule is None:
        reason = "there is no min_confidence for this call" if curves else "these answers have no confidence"
        raise UsageError(f"unsure is {then!r}, but {reason}", "give min_confidence too" if curves else _HAS_CONFIDENCE)


def check_min_confidence(value: object) -> None:
    """UsageError for a value that is neither a probability nor None."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UsageError(f"min_confidence is {value!r}", "give a number from 0 to 1")


def is_below(confidence: float | None, min_confidence: float | None) -> bool:
    """Whether a confidence is lower than is asked for, if anything is; an unknown one counts as low."""
    return min_confidence is not None and (confidence is None or confidence < min_confidence)


def require_curves(min_confidence: float | None, curves: Curves) -> None:
    """UsageError for a `min_confidence` of answers that have no confidence."""
    if min_confidence is not None and not curves:
        message = f"min_confidence is {min_confidence:g}, but these answers have no confidence"
        raise UsageError(message, _HAS_CONFIDENCE)


@dataclass(frozen=True)
class _Settling:
    loaded: LoadedBundle
    answer_call: AnswerCall
    outcome: Outcome
    rule: UnsureRule

    def pieces(self, own_pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        if self.rule.then == MARK:
            yield from own_pieces
            self.outcome.answer = self._marked()
            return
        for _ in own_pieces:
            pass
        answer = self._marked()
        self.outcome.answer = answer
        if answer.is_unsure and not answer.was_stopped:
            yield from self._instead(answer)
        else:
            yield from _content(answer)

    def _marked(self) -> Answer:
        answer = self.outcome.answer
        assert answer is not None
        return replace(answer, is_unsure=is_below(answer.confidence, self.rule.min_confidence))

    def _instead(self, answer: Answer) -> Generator[str, None, None]:
        rule, then = self.rule, self.rule.then
        if then == ERROR:
            sureness = "unknown" if answer.confidence is None else f"{answer.confidence:.2f}"
            message = f"the confidence of the answer is {sureness}, and {rule.min_confidence:g} is asked for"
            raise UnsureError(message, "ask in other words, or with a lower min_confidence", answer)
        if then == ASK:
            self._replace(answer, ASK, rule.question, tokens=self._tokens_of(rule.question))
        elif then == DEFER:
            self._defer(answer)
        else:
            # If its adapter was removed, or is in another bundle, from which this one was added, the answer stays.
            yield from self._other(answer, None if then == BASE else then)
            return
        yield from _content(self.outcome.answer)

    def _other(self, answer: Answer, adapter: str | None) -> Generator[str, None, None]:
        """Let the base or another adapter answer."""
        answer_call, outcome = self.answer_call, Outcome()

        def begin() -> tuple[str, Generator[str, None, None]]:
            call = self.loaded.call(answer_call.prompt, adapter, form=answer_call.form, check=answer_call.limits.check)
            pieces = replace(answer_call, call=call).generate(outcome)
            return next(pieces, ""), pieces

        try:
            begun, pieces = self.loaded.replaced.prepared(begin)
        except EdgetuneError as error:
            _LOG.warning("kept an unsure answer: %s", error)
            yield from _content(answer)
            return
        if not begun and outcome.answer is not None and outcome.answer.was_stopped:
            self._keep(answer, outcome.answer.stop_reason)
            yield from _content(self.outcome.answer)
            return
        if begun:
            yield begun
        yield from pieces
        assert outcome.answer is not None
        self.outcome.answer = replace(
            outcome.answer,
            confidence=answer.confidence,
            kind=answer.kind,
            log_odds=answer.log_odds,
            is_unsure=True,
            instead=self.rule.then,
            replaced=answer,
            route=answer.route,
        )

    def _defer(self, answer: Answer) -> None:
        answer_call, to = self.answer_call, self.loaded.options.defer_to
        if to is None:
            return
        call, form, options = answer_call.call, answer_call.form, answer_call.options
        output = call.output if call.labels is None else spec_of(choices=call.labels.labels)
        bounds = {name: options[name] for name in ("stop", "max_tokens") if name in options}
        sampling = sampling_of(options.get("sampling"), bounds)
        try:
            with self.loaded.deferring():
                messages = messages_for(answer_call.prompt, call.system)
                text, calls = ask(to, messages, form.tools, output, answer_call.limits.check, stop=sampling.stop)
            whole = answer_text(text, [(each.name, each.arguments) for each in calls])
            tokens = self._checked_length(to, whole, sampling.max_tokens)
        except EdgetuneError as error:
            _LOG.warning("kept an unsure answer: %s", error)
        except Stopped as stopped:
            self._keep(answer, stopped.reason)
        else:
            self._replace(answer, DEFER, text, tokens=tokens, tool_calls=calls, kind=answer.kind, output=call.output)

    def _checked_length(self, to: DeferTo, text: str, max_tokens: int) -> int:
        """The tokens of a text; DeferError for more. The limit is not sent: a model may think before it answers."""
        with self.loaded.base.tokenizer() as tokenizer:
            is_too_long = len(text) > max_tokens * tokenizer.longest
        if is_too_long or (tokens := self._tokens_of(text)) > max_tokens:
            message = f"{to.model!r} answered with more than {max_tokens} tokens"
            raise DeferError(message, "give a larger max_tokens")
        return tokens

    def _tokens_of(self, text: str) -> int:
        with self.loaded.base.tokenizer() as tokenizer:
            return len(tokenizer.tokenize(text, continues=True))

    def _keep(self, answer: Answer, reason: str) -> None:
        """Keep an unsure answer where another one had to stop for this reason."""
        if reason == "cancelled":
            self.outcome.answer = replace(answer, stop_reason=reason)

    def _replace(self, answer: Answer, by: str, text: str, **fields: Any) -> None:  # noqa: ANN401 - those of Answer
        changed = {"kind": QUESTION, "output": None, "tool_calls": (), **fields}
        changed |= {"text": text, "content": text, "stop_reason": "end", "logprobs": None}
        changed |= {"instead": by, "replaced": answer}
        self.outcome.answer = replace(answer, **changed)


def _content(answer: Answer | None) -> Generator[str, None, None]:
    if answer is not None and answer.content:
        yield answer.content
