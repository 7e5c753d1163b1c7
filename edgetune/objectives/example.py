"""A tokenized row of a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A tokenized row.

    `learned[i]` says whether the model learns to predict `tokens[i]`; always False for the first token.
    `prompt_length` is the number of prompt tokens on the device; for a text row it is 1. Its loss is multiplied by
    `weight`.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt_length: int
    weight: float = 1.0

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The tokens of the prompt on the device."""
        return self.tokens[: self.prompt_length]
