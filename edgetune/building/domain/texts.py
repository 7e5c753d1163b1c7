"""Splits the texts of a recipe's domain into windows of tokens. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError

from edgetune.objectives.example import Example
from edgetune.tasks.task import Texts


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[Example]:
    """The texts as windows of at most `length` tokens; all tokens of a window except the first are learned.

    The windows of a text overlap by one token, so that each of its tokens except the first is learned once.
    """
    cut: list[tuple[int, ...]] = []
    for text in texts:
        tokens = tokenizer.tokenize(text)
        cut += [tuple(tokens[start : start + length]) for start in range(0, len(tokens) - 1, length - 1)]
    return [Example(tokens, (False, *[True] * (len(tokens) - 1)), 1) for tokens in cut]


def split_windows(
    texts: Texts, tokenizer: Tokenizer, length: int, held_out: float
) -> tuple[list[Example], list[Example]]:
    """Windows for training and for validation; UsageError if there are too few.

    Without texts for validation the last windows are held out: neighbouring windows are similar and should not be in
    both sets.
    """
    train = windows_of(texts.train, tokenizer, length)
    validation = windows_of(texts.validation or (), tokenizer, length)
    if texts.validation is None:
        if len(train) < 2:
            message = f"the domain's text has fewer than 2 windows of {length} tokens, so none can be held out"
            raise UsageError(message, "set domain.data.validation, add text or lower domain.window")
        count = min(max(1, round(held_out * len(train))), len(train) - 1)
        return train[:-count], train[-count:]
    if not train or not validation:
        which = "validation" if train else "train"
        raise UsageError(f"domain.data.{which} has fewer than 2 tokens, so nothing can be learned", "use a longer text")
    return train, validation
