"""Tokens in, logits out: what every engine can do, and nothing of how prompts, sampling or caching work."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError

Logits = NDArray[np.float32]


class StepStopped(Exception):  # noqa: N818 - no error: the step was asked to end
    """A step ended before it was done, because `Engine.stop_step` asked for that; the sequence is as before it."""


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
    """One base with its adapters and one sequence of tokens. Not thread-safe: the caller holds a lock.

    An adapter that is a prefix takes the first positions of the context, and the sequence begins behind it. At most one
    may be active, with scale 1, beside any other adapters.

    `BATCH_COST` maps a number of tokens to about what a step of so many costs in steps of one token.
    """

    BATCH_COST: Mapping[int, float]
    context_length: int

    @property
    def kv_bytes(self) -> float:
        """What the number of a key or a value takes."""

    @property
    def threads(self) -> int:
        """Threads that a step computes with when no others want the cores."""

    @property
    def adjusts_threads(self) -> bool:
        """Whether `use_threads` has an effect."""

    @property
    def signatures(self) -> tuple[str, ...]:
        """What a saved state depends on besides the base: the library, its version, and how it keeps numbers.

        Behind its own stand those of engines whose states it could go on with, in other last bits.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's own tokenizer."""

    def fork(self) -> Self:
        """Another engine on the same loaded base and adapters, with a sequence of its own; to be closed before this."""

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """Check the adapter file, load it beside the base and keep it; a name already loaded is left as it is.

        Loading a prefix drops the sequence. IncompatibleError when the file says that it was made for another base than
        that with `fingerprint`, if given, or that other tokens than `invocation` activate it: the engine does not heed
        them, the caller switches the adapter on where they stand (see `activation`).
        """

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Switch to exactly these loaded adapters, each times its scale; `{}` is the plain base.

        The sequence stays, unless the prefix is another one than before. UsageError for two prefixes or a scaled one.
        """

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """How many tokens a sequence may have beside what these adapters take of the context."""

    def forget(self, keep: int) -> int:
        """Drop the sequence's tokens from position `keep` on; returns how many are left (0 if it cannot trim)."""

    def use_threads(self, count: int) -> None:
        """Compute the steps from now on with so many threads, which changes no bit of them."""

    def stop_step(self) -> None:
        """Have the step that another thread computes end soon with StepStopped.

        Where none runs, the next one may end so.
        """

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after the last, shape [vocab]. UsageError when they do not fit in the context."""

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Append tokens; logits after each of the `last` ones (default: all), shape [last, vocab].

        UsageError when the tokens do not fit in the context.
        """

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation after the sequence, which stays as it is.

        Shared beginnings are computed once. The last call that changed the sequence must have been a decode.
        """

    def save_state(self) -> memoryview:
        """The sequence's keys and values, for `restore_state` of the same base."""

    def restore_state(self, state: memoryview) -> None:
        """Replace the sequence by a saved one; decode at least one token before `score`.

        VerificationError, the sequence dropped, for bytes that are no state of this base.
        """

    def close(self) -> None:
        """Free everything; a second call does nothing."""


class EngineClass(Protocol):
    """What makes engines of one format, and tells of a base what can be told without loading it.

    `bytes_per_number` is the most that a key or a value takes. `KV` names the forms that they can have, the default
    first.
    """

    bytes_per_number: float
    KV: tuple[str, ...]

    def __call__(
        self,
        path: Path,
        *,
        context_length: int,
        threads: int | None = None,
        kv: str | None = None,
        repack: bool | None = None,
    ) -> Engine:
        """Load the base at `path`; `context_length` is in tokens, `kv` one of `KV`; for `repack` see `Runtime.open`."""

    def examine(self, path: Path, sha256: str) -> tuple[list[Path], str | None]:
        """All files that are read for the base at `path`, whose digest is `sha256`, that one first; its fingerprint."""


def check_options(context_length: int, threads: int | None, batch: int) -> None:
    """UsageError unless all that an engine is made with is positive."""
    if context_length < 1 or batch < 1 or (threads is not None and threads < 1):
        message = f"context_length {context_length}, batch {batch} and threads {threads} must be positive"
        raise UsageError(message, "give larger numbers")


def check_kv(kv: str | None, known: tuple[str, ...], engine: str) -> str:
    """The form of keys and values, by default the first of those known; UsageError for any other."""
    if kv is not None and kv not in known:
        raise UsageError(f"{engine} cannot keep keys and values as {kv!r}", f"choose one of: {', '.join(known)}")
    return kv or known[0]


def check_trained(context_length: int, trained: int) -> None:
    """UsageError when the context is longer than the base was trained for."""
    if context_length > trained:
        message = f"a context of {context_length} tokens is longer than the {trained} that the base was trained for"
        raise UsageError(message, f"give at most {trained}")


def check_room(tokens: Sequence[int], length: int, context_length: int, vocab_size: int) -> None:
    """UsageError unless there are tokens, of this vocabulary, that fit behind `length` others."""
    if not tokens:
        raise UsageError("there are no tokens to decode", "give at least one")
    if length + len(tokens) > context_length:
        message = f"{length + len(tokens)} tokens do not fit in a context of {context_length}"
        raise UsageError(message, "shorten the prompt, or open the bundle with a longer context")
    _check_tokens(tokens, vocab_size)


def check_continuations(
    continuations: Sequence[Sequence[int]], length: int, context_length: int, vocab_size: int
) -> None:
    """UsageError unless all continuations are of this vocabulary, and the longest fits behind `length` tokens."""
    for tokens in continuations:
        _check_tokens(tokens, vocab_size)
    longest = max(map(len, continuations), default=0)
    if length + longest > context_length:
        message = f"{length} tokens and {longest} of a label do not fit in a context of {context_length}"
        raise UsageError(message, "shorten the prompt, or open the bundle with a longer context")


def check_scales(adapters: Mapping[str, float], loaded: Container[str]) -> None:
    """NotFoundError for an adapter that is not loaded, UsageError for a scale that is no finite number."""
    for name, scale in adapters.items():
        if name not in loaded:
            raise NotFoundError(f"adapter {name!r} is not loaded", "load it first")
        if not math.isfinite(scale):
            raise UsageError(f"adapter {name!r} has scale {scale}", "give a finite number")


def prefix_among(adapters: Mapping[str, float], prefixes: Container[str]) -> str | None:
    """The one that is a prefix, if any; UsageError for two, or for a scale other than 1. Scale 0 leaves it out."""
    found = [name for name, scale in adapters.items() if name in prefixes and scale != 0]
    if len(found) > 1:
        message = f"adapters {found[0]!r} and {found[1]!r} are both prefixes, and a sequence begins behind one"
        raise UsageError(message, "use one of them")
    if found and adapters[found[0]] != 1:
        message = f"adapter {found[0]!r} is a prefix, which cannot be scaled by {adapters[found[0]]:g}"
        raise UsageError(message, "use it with scale 1")
    return found[0] if found else None


def check_prefix_room(name: str, tokens: int, context_length: int) -> None:
    """IncompatibleError unless a prefix of so many tokens leaves room for two more."""
    if tokens + 2 > context_length:
        message = f"adapter {name!r} is a prefix of {tokens} tokens, the context holds {context_length}"
        raise IncompatibleError(message, f"open the bundle with a context_length of {tokens + 2} or more")


def log_total(row: Logits) -> float:
    """Logarithm of the sum of the exponentials of one row of logits."""
    top = float(row.max())
    return top + math.log(float(np.exp(row - top).sum(dtype=np.float64)))


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise UsageError(f"a token is outside the vocabulary of {vocab_size}", "use this base's own tokenizer")
