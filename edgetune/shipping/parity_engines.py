"""Engines for the parity check that do with threads and with activated LoRA what a runtime does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from edgetune_runtime.engines.base import Engine, Logits, Tokenizer
from edgetune_runtime.serving.governor import AnswerUsage, Governor
from edgetune_runtime.states.activation import Invocations, spans_of
from edgetune_runtime.threads.count import DECODE, PREFILL


class GovernedEngine:
    """Computes as `engine` does, with the threads that a runtime would use: a step that stalls is computed again.

    Steps take fewer threads while other processes use the cores.
    """

    def __init__(self, engine: Engine) -> None:
        self.tokenizer: Tokenizer = engine.tokenizer
        self._engine = engine
        self._governor = Governor(engine.threads, adjusts=engine.adjusts_threads)

    def activate(self, adapters: Mapping[str, float]) -> None:
        """See `Engine`."""
        self._engine.activate(adapters)

    def truncate(self, keep: int) -> int:
        """See `Engine`."""
        return self._engine.truncate(keep)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Engine`."""
        return self._step(len(tokens), lambda: self._engine.decode(tokens))

    def decode_all(self, tokens: Sequence[int]) -> Logits:
        """See `Engine`."""
        return self._step(len(tokens), lambda: self._engine.decode_all(tokens))

    def _step(self, tokens: int, compute: Callable[[], Logits]) -> Logits:
        kind = DECODE if tokens == 1 else PREFILL
        # Nothing stops a step but its stalling.
        return self._governor.step(self._engine, tokens, compute, lambda: None, AnswerUsage(), kind=kind)


class ActivatedLoraEngine:
    """Switches an activated LoRA on after its invocation, as the runtime does (see `activation.spans_of`).

    The first call after `truncate(0)` must contain the invocation.
    """

    def __init__(self, engine: GovernedEngine, adapters: Mapping[str, float], invocations: Invocations) -> None:
        self.tokenizer: Tokenizer = engine.tokenizer
        self._engine, self._adapters, self._invocations = engine, adapters, invocations
        self._is_empty = True

    def truncate(self, keep: int) -> int:
        """Drop the tokens from position `keep` on."""
        self._is_empty = keep == 0
        return self._engine.truncate(keep)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after the last, shape [vocab]."""
        last: Logits = self.decode_all(tokens)[-1]
        return last

    def decode_all(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after each, shape [tokens, vocab]."""
        if not self._is_empty:
            return self._engine.decode_all(tokens)
        self._is_empty = False
        spans = spans_of(self._adapters, self._invocations, tokens)
        ends = [since for since, _ in spans[1:]] + [len(tokens)]
        rows = []
        for (since, adapters), end in zip(spans, ends, strict=True):
            self._engine.activate(adapters)
            rows.append(self._engine.decode_all(tokens[since:end]))
        return np.concatenate(rows)
