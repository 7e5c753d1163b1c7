"""A model in torch in, an engine of the runtime out: the checkpoint answers through the very code that the device runs.

A method promises logits of given tokens and no cache of keys and values, so an answer is computed ahead: the model
reads a guess of the whole answer at once, and only where its own choice differs is the rest computed anew. The answers
are those of greedy decoding, whatever the guesses are worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from edgetune_runtime.engines.base import Logits, Tokenizer

from edgetune.shipping.verify import logits_of


class TorchEngine:
    """One model with what was trained on it; `guesses` are answers to the prompts to come, in their order."""

    BATCH_COST: ClassVar[Mapping[int, float]] = {2: 2.0}

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

    @property
    def threads(self) -> int:
        """Those of torch are its own affair."""
        return 1

    @property
    def adjusts_threads(self) -> bool:
        """Torch keeps its threads."""
        return False

    @property
    def kv_bytes(self) -> float:
        """Nothing is kept of a token but its number."""
        return 0.0

    @property
    def signatures(self) -> tuple[str, ...]:
        """No state of this engine is kept on a disk."""
        return ("torch",)

    def fork(self) -> TorchEngine:
        """An engine of its own on the same model, without guesses."""
        return TorchEngine(self._model, self.tokenizer, context_length=self.context_length, guesses=())

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """Nothing: what was trained is in the model."""

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Nothing: what was trained is always active."""

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """How many tokens a sequence may have."""
        return self.context_length

    def truncate(self, keep: int) -> int:
        """Drop the tokens from position `keep` on."""
        del self._tokens[keep:]
        self._is_new = True
        return len(self._tokens)

    def use_threads(self, count: int) -> None:
        """Nothing."""

    def stop_step(self) -> None:
        """Nothing: steps run to their end."""

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Logits after a prompt or a part of it, [vocab]; the next guess is taken to be its answer."""
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
        """The tokens themselves."""
        return memoryview(np.asarray(self._tokens, np.int64).tobytes())

    def restore_state(self, state: memoryview) -> None:
        """The tokens of a saved state."""
        self._tokens = np.frombuffer(state, np.int64).tolist()

    def close(self) -> None:
        """Nothing: the model belongs to the caller."""

    def _after(self, count: int) -> Logits:
        """Logits after each of the last `count` tokens."""
        length = len(self._tokens)
        if self._known[:length] != self._tokens:
            # Where one token differs, such as a value in JSON, the rest of the guess is likely to be right still.
            self._known = [*self._tokens, *self._guess[length:]][: self.context_length]
            self._rows = self._logits(self._known)
        return self._rows[length - count : length]

    def _score(self, continuation: Sequence[int]) -> float:
        rows = self._logits([*self._tokens, *continuation])[len(self._tokens) - 1 : -1].astype(np.float64)
        chosen = rows[np.arange(len(continuation)), list(continuation)]
        return float((chosen - np.logaddexp.reduce(rows, axis=1)).sum())
