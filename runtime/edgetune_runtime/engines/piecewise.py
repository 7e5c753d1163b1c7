"""The base class of tokenizers: splits texts that would be tokenized wrongly, or slowly, as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.controls import ControlTokens


class PiecewiseTokenizer(ABC):
    """A `Tokenizer` whose class tokenizes one piece.

    A text begins with `_added_bos`, if it is not empty. With `_adds_space`, the library adds a space before the first
    word, but not after `_newline`. After `close`, `vocab_size` is 0.
    """

    vocab_size: int
    _added_bos: Sequence[int]
    _adds_space: bool
    _newline: int | None

    @property
    @abstractmethod
    def controls(self) -> ControlTokens:
        """The control tokens by their names."""

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""

    @abstractmethod
    def _raw(self, text: str) -> list[int]:
        """The library's tokens of one piece."""

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.pieces()))

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`; see `Tokenizer.tokenize`."""
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
