"""A runtime engine around a torch model, so that the checkpoint is scored by the same code that runs on the device.

Methods have no KV cache in torch, so this engine decodes speculatively: the model reads a guess of the whole answer in
one pass, and reads again only where its own token differs. The answers are those of greedy decoding whatever the
guesses are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from edgetune_runtime.engines.base import Logits, Tokenizer

from edgetune.shipping.verify import logits_of


class TorchEngine:
    """A tuned model as an engine; `guesses` are guessed answers to the following prompts, in order.

    It has no KV cache, torch manages its threads, and its states are never saved to disk.
    """

    BATCH_COST: ClassVar[Mapping[int, float]] = {2: 2.0}
    EVEN_ROWS: ClassVar[int] = 1
    LOGITS_COST: ClassVar[Mapping[int, float]] = {}
    logits_excess = 0.0
    max_rollback = None
    threads = 1
    adjusts_threads = False
    signatures = ("torch",)

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - with or without PEFT around it
        tokenizer: Tokenizer,
        *,
        context_length: int,
        guesses: Iterable[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._model = model
        self._logits = logits_of(model)
        self._guesses = iter(guesses)
        self._tokens: list[int] = []
        self._guess: list[int] = []
        self._answer: list[int] = []
        self._is_new = True
        self._known: list[int] = []
        self._rows: Logits = np.empty((0, tokenizer.vocab_size), np.float32)

    def fork(self) -> TorchEngine:
        """A new engine on the same model, without guesses."""
        return TorchEngine(self._model, self.tokenizer, context_length=self.context_length, guesses=())

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """Does nothing: the trained weights are in the model."""

    def unload_adapter(self, name: str) -> None:
        """Does nothing, as `load_adapter`."""

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Does nothing: the trained weights are always active."""

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """Most tokens in a sequence."""
        return self.context_length

    def truncate(self, keep: int) -> int:
        """Drop the tokens from position `keep` on."""
        del self._tokens[keep:]
        self._is_new = True
        return len(self._tokens)

    def use_threads(self, count: int) -> None:
        """Does nothing: torch manages its own threads."""

    def end_threads(self) -> None:
        """Does nothing: torch manages its own threads."""

    def stop_step(self) -> None:
        """Does nothing: steps always run to their end."""

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Logits after a prompt or part of it, [vocab]; the first call after `truncate` uses the next guess."""
        self._tokens += tokens
        if self._is_new:
            text, self._is_new = next(self._guesses, None), False
            ended = [] if text is None else [*self.tokenizer.tokenize(text, continues=True), self.tokenizer.end_token]
            self._answer = ended
        self._guess = [*self._tokens, *self._answer]
        last: Logits = self._after(1)[-1]
        return last

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Logits after each of the `last` tokens (default: all), [last, vocab]."""
        self._tokens += tokens
        return self._after(len(tokens) if last is None else last)

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation."""
        return [self._score(continuation) for continuation in continuations]

    def save_state(self) -> memoryview:
        """The tokens of the sequence."""
        return memoryview(np.asarray(self._tokens, np.int64).tobytes())

    def restore_state(self, state: memoryview) -> None:
        """Restore the tokens of a saved state."""
        self._tokens = np.frombuffer(state, np.int64).tolist()

    def close(self) -> None:
        """Does nothing: the model belongs to the caller."""

    def _after(self, count: int) -> Logits:
        """Logits after each of the last `count` tokens."""
        length = len(self._tokens)
        if self._known[:length] != self._tokens:
            # Keep the rest of the guess: after one different token, such as a value in JSON, it is often still right.
            self._known = [*self._tokens, *self._guess[length:]][: self.context_length]
            self._rows = self._logits(self._known)
        return self._rows[length - count : length]

    def _score(self, continuation: Sequence[int]) -> float:
        rows = self._logits([*self._tokens, *continuation])[len(self._tokens) - 1 : -1].astype(np.float64)
        chosen = rows[np.arange(len(continuation)), list(continuation)]
        return float((chosen - np.logaddexp.reduce(rows, axis=1)).sum())
