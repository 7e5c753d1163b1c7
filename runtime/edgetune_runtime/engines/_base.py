"""Tokens in, logits out: what every engine can do, and nothing of how prompts, sampling or caching work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Tokenizer(Protocol):
    """Text to token ids and back, exactly as the engine's model wants it. Safe to call from several threads."""

    bos: str
    eos: str
    chat_template: str | None
    vocab_size: int

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`, special tokens recognized, with BOS in front where the vocabulary wants it.

        With `continues` the text follows other tokens: no BOS, and no leading space where the vocabulary would add one.
        """

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for, which may be part of a UTF-8 character; empty for control tokens."""

    def is_end(self, token: int) -> bool:
        """Whether generation ends with `token`."""

    @property
    def end_token(self) -> int:
        """The token that ends a turn, or else the one that ends a text."""


class Engine(Protocol):
    """One base with its adapters and one sequence of tokens. Not thread-safe: the caller holds a lock."""

    context_length: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's own tokenizer."""

    def load_adapter(self, name: str, path: Path) -> None:
        """Check the adapter file, load it beside the base and keep it; a name already loaded is left as it is."""

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Switch to exactly these loaded adapters, each times its scale; `{}` is the plain base. The sequence stays."""

    def forget(self, keep: int) -> int:
        """Drop the sequence's tokens from position `keep` on; returns how many are left (0 if it cannot trim)."""

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after the last, shape [vocab]. UsageError when they do not fit in the context."""

    def decode_all(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after each, shape [tokens, vocab]. UsageError when they do not fit in the context."""

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation after the sequence, which stays as it is.

        Shared beginnings are computed once. The last call that changed the sequence must have been a decode.
        """

    def save_state(self) -> bytes:
        """The sequence's keys and values, for `restore_state` of the same base."""

    def restore_state(self, state: bytes) -> None:
        """Replace the sequence by a saved one; decode at least one token before `score`."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""
