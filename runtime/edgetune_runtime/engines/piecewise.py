"""The base class of tokenizers: splits texts that would be tokenized wrongly, or slowly, as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from edgetune_runtime.text.controls import ControlTokens


class PiecewiseTokenizer(ABC):
    """A `Tokenizer` whose class tokenizes one piece."""

    @property
    @abstractmethod
    def controls(self) -> ControlTokens:
        """The control tokens by their names."""

    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""

    @abstractmethod
    def _tokenize(self, text: str, *, continues: bool) -> list[int]:
        """`Tokenizer.tokenize` for one piece."""

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.pieces()))

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`; see `Tokenizer.tokenize`."""
        first, *others = self.controls.pieces(text)
        tokens = self._tokenize(first, continues=continues)
        return tokens + [token for piece in others for token in self._tokenize(piece, continues=True)]
