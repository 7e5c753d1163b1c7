"""The interface of all engines (tokens in, logits out), the base class of their tokenizers, and checks they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import IncompatibleError, NotFoundError, PromptTooLongError, UsageError
from edgetune_runtime.text.chat import Prompt
from edgetune_runtime.text.controls import ControlTokens
from edgetune_runtime.text.sampling import likeliest

Logits = NDArray[np.float32]


class StepStopped(Exception):  # noqa: N818 - not an error: the step was asked to stop
    """`Engine.stop_step` stopped a step; the sequence is the same as before the step."""


class Tokenizer(ABC):
    """The tokenizer of an engine's model, whose subclass tokenizes one piece of a text. Thread-safe.

    Texts that would be tokenized wrongly, or slowly, as a whole are split. A text begins with `_added_bos`, if it is
    not empty. With `_adds_space`, the library adds a space before the first word, but not after `_newline`. After
    `close`, `vocab_size` is 0.
    """

    bos: str
    eos: str
    chat_template: str | None
    vocab_size: int
    _added_bos: Sequence[int]
    _adds_space: bool
    _newline: int | None

    @property
    @abstractmethod
    def controls(self) -> ControlTokens:
        """The control tokens by their names."""

    @property
    @abstractmethod
    def end_token(self) -> int:
        """The end-of-turn token, or the end-of-text token if there is none."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes of `token`, which may be a part of a UTF-8 character; empty for control tokens."""

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of every token, as `piece` gives them, in a fraction of the time."""

    @abstractmethod
    def is_end(self, token: int) -> bool:
        """Whether generation ends with `token`."""

    @abstractmethod
    def ends(self) -> list[int]:
        """All tokens that generation ends with, in order."""

    @abstractmethod
    def _raw(self, text: str) -> list[int]:
        """The library's tokens of one piece."""

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.pieces()))

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`, with control tokens parsed, and with BOS first if the vocabulary asks for it.

        Those that `controls.as_text` marked are not parsed. With `continues` the text follows other tokens: without BOS
        and without the leading space of SentencePiece.
        """
        first, *others = self.controls.pieces(text)
        tokens = self._continued(first) if continues else self._raw(first)
        if not continues and tokens[:1] != self._added_bos:
            tokens = [*self._added_bos, *tokens]
        return tokens + [token for piece in others for token in self._continued(piece)]

    def close(self) -> None:
        """Refuse all further calls, because what the tokens are looked up in may be freed."""
        self.vocab_size = 0

    def _continued(self, text: str) -> list[int]:
        """Tokens of a piece that follows others."""
        if not self._adds_space:
            return self._raw(text)
        tokens = self._raw("\n" + text)
        return tokens[tokens.index(self._newline) + 1 :] if self._newline in tokens else self._raw(text)

    def _check(self, token: int = 0) -> None:
        """Raise UsageError after `close` and for a token outside the vocabulary: at one, llama.cpp ends the process."""
        if self.vocab_size == 0:
            raise UsageError("the tokenizer is closed", "open it again")
        if not 0 <= token < self.vocab_size:
            message = f"no token {token} in a vocabulary of {self.vocab_size}"
            raise UsageError(message, "use the tokenizer of this base")


class TextTokenizer(Protocol):
    """Text to token ids, with the special tokens that the model wants around them."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`."""


class Engine(Protocol):
    """One base with its adapters and one sequence of tokens. Not thread-safe: the caller must lock it.

    `context_length` is the one that the bundle was opened with, in tokens; an engine may allocate more. A prefix
    adapter occupies the first positions of the context, and the sequence starts after it. At most one prefix can be
    active, with scale 1, together with any other adapters.

    `BATCH_COST` maps a number of tokens to the approximate cost of decoding them in one step, in single-token steps.
    `LOGITS_COST` does so for their logits alone, in those of one token; it is empty if they make no difference.
    Steps of at least `EVEN_ROWS` tokens round alike, however many there are.
    """

    BATCH_COST: ClassVar[Mapping[int, float]]
    EVEN_ROWS: ClassVar[int]
    LOGITS_COST: ClassVar[Mapping[int, float]]
    context_length: int

    @property
    def logits_excess(self) -> float:
        """The share of a single-token step that logits take, less that in the base that BATCH_COST was measured on."""

    @property
    def max_rollback(self) -> int | None:
        """How many tokens of a step `truncate` can drop, one of up to 32 tokens; None for any part of a sequence.

        With a number, the sequence can also be cut to the ends of the tokens of each `decode`, as far as the engine has
        kept what that needs, and a restored state only to its end.
        """

    @property
    def threads(self) -> int:
        """Maximum number of threads of a step: what the engine was opened with, by default one per available core."""

    @property
    def adjusts_threads(self) -> bool:
        """Whether `use_threads` has an effect."""

    @property
    def signatures(self) -> tuple[str, ...]:
        """What a saved state depends on besides the base: the library, its version, and its data types.

        First the engine's own, then those of engines whose states it can continue with different last bits.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the base."""

    def fork(self) -> Self:
        """Another engine with its own sequence, on the same loaded base and adapters; close it before this one.

        Both have this one's tokenizer, which closing the other one leaves open.
        """

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """Check and load an adapter file; does nothing if the name is already loaded.

        Other engines on the same base may compute meanwhile. IncompatibleError when the file is for another base than
        the one with `fingerprint`, if given, or has other invocation tokens than `invocation`. The engine does not look
        for these tokens: the caller activates the adapter at the right position (see `states.activation`).
        """

    def unload_adapter(self, name: str) -> None:
        """Free an adapter, or do nothing if it is not loaded; no engine on the same base may compute with it.

        Engines that have it active must activate others before their next step. Others may compute meanwhile.
        """

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Switch to exactly these loaded adapters with their scales; `{}` is the plain base.

        Keeps the sequence, unless the prefix changes. UsageError for two prefixes or a scaled prefix.
        """

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """The longest sequence with these adapters: `context_length` minus the tokens of a prefix among them."""

    def truncate(self, keep: int) -> int:
        """Truncate the sequence to its first `keep` tokens, or to fewer if it cannot be; returns the new length."""

    def use_threads(self, count: int) -> None:
        """Set the number of threads of the next steps, which does not change a bit of the results."""

    def end_threads(self) -> None:
        """End the threads that are kept for steps of the calling thread, if they slow down those of other threads."""

    def stop_step(self) -> None:
        """Make the step that another thread is running end soon with StepStopped.

        If no step is running, this may stop the next one.
        """

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; logits after the last, shape [vocab]. UsageError when they do not fit in the context."""

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Append tokens; logits after each of the `last` ones (default: all), shape [last, vocab].

        UsageError when the tokens do not fit in the context.
        """

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation of the sequence, which is not changed.

        Common prefixes are computed once. UsageError if a continuation does not fit in the context, or if the last call
        that changed the sequence was not a decode.
        """

    def save_state(self) -> memoryview:
        """The keys and values of the sequence, for `restore_state` on the same base."""

    def restore_state(self, state: memoryview) -> None:
        """Replace the sequence by a saved one; decode at least one token before `score`.

        VerificationError for bytes that are not a state of this base; the sequence is then dropped.
        """

    def close(self) -> None:
        """Free everything; a second call does nothing."""


class LabelEngine(Protocol):
    """One base whose adapters have labels: an answer is one forward pass, without a sequence. Thread-safe.

    `context_length` is in tokens, `threads` the number of threads of a pass.
    """

    context_length: int
    threads: int

    @property
    def tokenizer(self) -> TextTokenizer:
        """The base's own tokenizer."""

    def load_adapter(self, name: str, path: Path, fingerprint: str | None = None, labels: int | None = None) -> None:
        """Check the adapter file, load it and keep it; a name already loaded is left as it is.

        `labels` is the number of labels that it must have. VerificationError for a damaged file, IncompatibleError for
        one of another base than that with `fingerprint`, if given.
        """

    def unload_adapter(self, name: str) -> None:
        """Free an adapter once the passes that use it have ended; does nothing if it is not loaded."""

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt's text; UsageError when it does not fit in the context or is a conversation."""

    def logits(self, tokens: Sequence[int], name: str, scale: float = 1.0) -> Logits:
        """Logits of the adapter's labels, shape [labels], with `scale` times its update of the base."""

    def pooled(self, tokens: Sequence[int]) -> Logits:
        """The pooled last layer of the plain base, shape [hidden]."""

    def close(self) -> None:
        """Free everything after running calls end; a second call does nothing."""


class EngineClass(Protocol):
    """The class of an engine: loads a base, or examines one without loading it.

    `has_sequence`: an engine has one sequence, for one call at a time, and so needs contexts. `BATCH_COST` is that
    of `Engine`.
    """

    has_sequence: Literal[True]
    BATCH_COST: Mapping[int, float]

    def __call__(
        self,
        path: Path,
        *,
        context_length: int,
        threads: int | None = None,
        kv: str | None = None,
        repack: bool | None = None,
    ) -> Engine:
        """Load the base at `path`; `context_length` is in tokens; for `kv` and `repack` see `RuntimeOptions`."""

    def examine(self, path: Path, sha256: str) -> tuple[list[Path], str | None]:
        """All files of the base at `path`, which has the digest `sha256` and is listed first; and the fingerprint."""

    def library_version(self) -> str:
        """Name and version of the native library."""


class LabelEngineClass(Protocol):
    """Like `EngineClass`, for engines without a sequence and a KV cache."""

    has_sequence: Literal[False]

    def __call__(self, path: Path, *, context_length: int, threads: int | None = None) -> LabelEngine:
        """Load the base at `path`; `context_length` is in tokens."""

    def examine(self, path: Path, sha256: str) -> tuple[list[Path], str | None]:
        """See `EngineClass.examine`."""

    def library_version(self) -> str:
        """See `EngineClass.library_version`."""


def check_options(context_length: int, threads: int | None) -> None:
    """Raise UsageError unless both numbers are positive."""
    if context_length < 1 or (threads is not None and threads < 1):
        message = f"context_length {context_length} and threads {threads} must both be positive"
        raise UsageError(message, "give numbers of at least 1")


def check_context_length(context_length: int, trained_context_length: int) -> None:
    """Raise UsageError when the context is longer than the base was trained for."""
    if context_length > trained_context_length:
        message = f"context_length {context_length} is more than the base was trained for"
        raise UsageError(message, f"give at most {trained_context_length}")


def check_tokens_fit(tokens: Sequence[int], length: int, context_length: int, vocab_size: int) -> None:
    """Raise UsageError unless there are tokens, they are in the vocabulary, and they fit after `length` others."""
    if not tokens:
        raise UsageError("there are no tokens to decode", "give at least one")
    if length + len(tokens) > context_length:
        message = f"{length + len(tokens)} tokens do not fit in a context of {context_length}"
        raise UsageError(message, "shorten the prompt, or open the bundle with a larger context_length")
    _check_tokens(tokens, vocab_size)


def check_continuations(
    continuations: Sequence[Sequence[int]], length: int, context_length: int, vocab_size: int
) -> None:
    """Raise UsageError unless all continuations are in the vocabulary, and PromptTooLongError unless the longest fits
    after `length` tokens."""
    for tokens in continuations:
        _check_tokens(tokens, vocab_size)
    longest = max(map(len, continuations), default=0)
    if length + longest > context_length:
        message = f"{length} tokens and {longest} of a label do not fit in a context of {context_length}"
        raise PromptTooLongError(message, "shorten the prompt, or open the bundle with a larger context_length")


def check_scales(adapters: Mapping[str, float], loaded: Container[str]) -> None:
    """Raise NotFoundError for an adapter that is not loaded, UsageError for a scale that is not finite."""
    for name, scale in adapters.items():
        if name not in loaded:
            raise NotFoundError(f"adapter {name!r} is not loaded", "load it first")
        if not math.isfinite(scale):
            raise UsageError(f"adapter {name!r} has scale {scale}", "give a finite number")


def prefix_among(adapters: Mapping[str, float], prefixes: Container[str]) -> str | None:
    """The active prefix among the adapters; None if there is none. UsageError for two, or a scale other than 0 or 1."""
    active = [name for name, scale in adapters.items() if name in prefixes and scale != 0]
    if len(active) > 1:
        message = f"adapters {active[0]!r} and {active[1]!r} are both prefixes, and a sequence can have only one"
        raise UsageError(message, "use one of them")
    if active and adapters[active[0]] != 1:
        message = f"adapter {active[0]!r} is a prefix, which cannot be scaled by {adapters[active[0]]:g}"
        raise UsageError(message, "use it with scale 1")
    return active[0] if active else None


def check_prefix_fits(name: str, tokens: int, context_length: int) -> None:
    """Raise IncompatibleError unless at least two tokens fit after a prefix of `tokens` tokens."""
    if tokens + 2 > context_length:
        message = f"adapter {name!r} is a prefix of {tokens} tokens, too long for a context of {context_length}"
        raise IncompatibleError(message, f"open the bundle with a context_length of at least {tokens + 2}")


def log_total(row: Logits) -> float:
    """Log-sum-exp of one row of logits; raises what `likeliest` does."""
    top = float(row[likeliest(row)])
    return top + math.log(float(np.exp(row - top).sum(dtype=np.float64)))


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise UsageError(f"a token is outside the vocabulary of {vocab_size}", "use the tokenizer of this base")
