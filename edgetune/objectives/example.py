"""A row of a task as tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A row as tokens.

    `learned[i]` says whether the model learns to predict `tokens[i]`; the first, which nothing precedes, never is.
    `prompt_length` is the number of tokens that the device is given before it answers; of a text row it is 1.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt_length: int

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The tokens that the device is given before it answers."""
        return self.tokens[: self.prompt_length]
