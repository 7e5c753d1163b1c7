"""An engine whose activated LoRA is switched on after its invocation, as in the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from edgetune_runtime.engines.base import Logits, Tokenizer
from edgetune_runtime.states.activation import Invocations, spans_of

from .governed import GovernedEngine


class ActivatedLoraEngine:
    """An engine for the parity check that applies adapters in spans, as the runtime does (see `activation.spans_of`).

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
