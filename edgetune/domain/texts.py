"""Reads the texts of a recipe's domain and splits them into windows of tokens. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune.bases import trained_context_length
from edgetune.data import read_rows, read_text
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.recipe.rows import Rows

PLAIN_SUFFIX = ".txt"


@dataclass(frozen=True)
class Texts:
    """The texts of a domain; without `validation`, the end of the training text is held out."""

    train: Sequence[str]
    validation: Sequence[str] | None = None

    def __str__(self) -> str:
        """The amount of text."""
        amount = f"{sum(map(len, self.train))} characters of text"
        return amount if self.validation is None else f"{amount}, {sum(map(len, self.validation))} for validation"


def read_texts(recipe: Recipe) -> Texts | None:
    """The texts of the recipe's domain; None if it has none.

    Raises what `read_rows` raises, and UsageError for an empty file or rows that are not plain text.
    """
    if recipe.domain is None:
        return None
    data = recipe.domain.data
    return Texts(_texts(data.train), None if data.validation is None else _texts(data.validation))


def _texts(source: str | Rows) -> list[str]:
    path = Path(str(source))
    if path.suffix.lower() == PLAIN_SUFFIX and path.is_file():
        text = read_text(path)
        if not text.strip():
            raise UsageError(f"{source} is empty", "add text to it")
        return [text]
    texts = []
    for row in read_rows(source):
        if row.text is None:
            raise UsageError(f"{row.where}: not plain text", "use rows with only text, or a .txt file")
        texts.append(row.text)
    return texts


def window_of(recipe: Recipe, header: GgufHeader) -> int:
    """Tokens per window of the domain's text; UsageError if the base was trained for less."""
    trained = trained_context_length(header)
    window = None if recipe.domain is None else recipe.domain.window
    if window is not None and window > trained:
        message = f"domain.window is {window}, but {recipe.base!r} was trained for {trained} tokens"
        raise UsageError(message, f"set it to at most {trained}")
    return window or min(recipe.context_length, trained)


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
