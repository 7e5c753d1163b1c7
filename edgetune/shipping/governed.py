"""An engine for the parity check whose steps take fewer threads while other processes use the cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edgetune_runtime.engines.base import Engine, Logits, Tokenizer
from edgetune_runtime.serving.governor import AnswerUsage, Governor
from edgetune_runtime.threads.count import DECODE, PREFILL


class GovernedEngine:
    """Computes as `engine` does, with the threads that a runtime would use: a step that stalls is computed again."""

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
