"""The output constraint of one answer: which tokens may come next, which must, and where it may end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.sampling import likeliest

from .library import DEAD_END, one_line
from .vocabulary import GrammarVocabulary

T = TypeVar("T")

_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_BIAS = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), np.float32(0), np.float32(-np.inf))
"""What eight tokens' logits get for each byte of llguidance's mask: faster than unpacking it."""


class Constraint:
    """Follows one answer, token by token; made by `Grammars.constraint`. Not thread-safe.

    At each place: end the answer if `is_complete`; else take what `forced` gives, or choose a token by `best` or after
    `mask`; then `accept` it. Every method may raise UsageError when llguidance reaches its limits.
    """

    def __init__(
        self,
        start: Any,  # noqa: ANN401 - llguidance's matcher
        vocabulary: GrammarVocabulary,
        restart: Callable[[], Any],
    ) -> None:
        self._matcher = start
        self._vocabulary = vocabulary
        self._restart = restart
        self.tokens: list[int] = []
        """The tokens that were accepted, an end token included."""
        self._forced: list[int] | None = None
        self._bits = np.zeros((vocabulary.handle.vocab_size + 31) // 32, np.uint32)

    @property
    def may_end(self) -> bool:
        """Whether the answer so far fits its form, so that an end token may come next or has come."""
        return self._has_ended or (not self._matcher.is_error() and bool(self._matcher.is_accepting()))

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token may come next, or one has come: the answer can end without computing it."""
        return self._has_ended or (not self._matcher.is_error() and bool(self._matcher.is_stopped()))

    def may_end_after(self, count: int) -> bool:
        """Whether the first `count` of the accepted tokens, none of which is an end token, fit the answer's form."""
        matcher = self._matcher.deep_copy()
        matcher.rollback(len(self.tokens) - self._has_ended - count)
        return bool(matcher.is_accepting())

    def mask(self, logits: Logits) -> Logits | None:
        """A copy of the logits [vocab] with minus infinity for every token that may not come next.

        None after an end token, and at a dead end: no token of the vocabulary fits, and the answer may not end.
        """
        if not self._fill_bits():
            return None
        bias = _BIAS.take(self._bits.view(np.uint8), axis=0).ravel()
        bias[self._vocabulary.size :] = -np.inf
        if len(bias) < len(logits):
            # A padded vocabulary has more logits than tokens.
            bias = np.append(bias, np.full(len(logits) - len(bias), -np.inf, np.float32))
        masked = bias[: len(logits)]
        masked += logits
        return masked

    def best(self, logits: Logits) -> int | None:
        """The likeliest token of those that may come next, as `mask(logits).argmax()`; None at a dead end.

        The mask is computed only where the likeliest of all may not come next, which a tuned adapter seldom asks for.
        Raises what `likeliest` does.
        """
        forced = self.forced()
        if forced:
            return forced[0]
        first = likeliest(logits)
        if self.valid_prefix([first]):
            return first
        masked = self.mask(logits)
        return None if masked is None else likeliest(masked)

    def forced(self) -> list[int]:
        """The tokens that must come next, as the base's tokenizer cuts their text; [] where there is a choice."""
        if self.is_complete:
            return []
        if self._forced is None:
            tokens = self._ask(lambda matcher: list(matcher.compute_ff_tokens()))
            self._forced = list(takewhile(lambda token: token not in self._vocabulary.ends, tokens))
        return self._forced.copy()

    def valid_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next, one after another; an end token can only be the last of them.

        A text that is forced counts however it is cut into tokens, while `mask` allows the tokens of `forced` only.
        """
        if self._has_ended:
            return 0
        if self.is_complete:
            return int(bool(tokens) and tokens[0] in self._vocabulary.ends)
        valid = list(takewhile(lambda token: 0 <= token < self._vocabulary.size, tokens))
        count = self._ask(lambda matcher: int(matcher.validate_tokens(valid)))
        return 0 if self._matcher.is_error() else count

    def accept(self, *tokens: int) -> None:
        """Go on with these tokens; UsageError, with those before it accepted, for one that may not come next."""
        for token in tokens:
            if not self._takes(token):
                raise UsageError(f"token {token} may not come next in this answer", "choose one after mask()")
            self.tokens.append(token)
            self._forced = None

    @property
    def _has_ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._vocabulary.ends

    def _fill_bits(self) -> bool:
        """Compute the bit of each token that says whether it may come next; False at a dead end."""
        bits, ends = self._bits, self._vocabulary.end_list
        if self._has_ended:
            return False
        self._ask(lambda matcher: matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes))
        # llguidance gives the end tokens in place of what it could not compute.
        if self._matcher.is_error():
            return False
        # A grammar may name an end token by its number, or any token, where the answer may not end yet.
        named = [token for token in ends if bits[token >> 5] >> (token & 31) & 1]
        if named and not self.may_end:
            for token in named:
                bits[token >> 5] &= ~np.uint32(1 << (token & 31))
            return bool(bits.any())
        return True

    def _takes(self, token: int) -> bool:
        if self._has_ended:
            return False
        if token in self._vocabulary.ends:
            return self.may_end
        if not 0 <= token < self._vocabulary.size:
            return False
        return self._ask(lambda matcher: bool(matcher.try_consume_tokens([token]) == 1))

    def _ask(self, question: Callable[[Any], T]) -> T:
        """The matcher's answer, that of another one if this one fails; UsageError if that fails too."""
        answer = question(self._matcher)
        if self._failure():
            # Answers of one form share the states of its automaton, whose limit may be due to the others.
            self._revive()
            answer = question(self._matcher)
            self._check()
        return answer

    def _revive(self) -> None:
        # A matcher stays in an error, so another one takes its place.
        self._matcher = self._restart()
        self._matcher.consume_tokens(self.tokens)

    def _failure(self) -> str:
        """Why the matcher failed, or ''; a dead end is not a failure."""
        error = str(self._matcher.get_error())
        return "" if DEAD_END in error else error

    def _check(self) -> None:
        failure = self._failure()
        if failure:
            message = f"after {len(self.tokens)} tokens the output constraint failed: {one_line(failure)}"
            raise UsageError(message, "simplify the form, or bound its repetitions")
