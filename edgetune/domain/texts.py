"""A recipe's domain in, its plain text out; texts and a tokenizer in, windows of tokens to learn out. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune.bases import base_context_length
from edgetune.data import read_rows, read_text
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe

PLAIN_SUFFIX = ".txt"


@dataclass(frozen=True)
class Texts:
    """The texts of a domain; without `validation`, the end of those for training is held out."""

    train: Sequence[str]
    validation: Sequence[str] | None = None

    def __str__(self) -> str:
        """How much there is."""
        told = f"{sum(map(len, self.train))} characters of text"
        return told if self.validation is None else f"{told}, {sum(map(len, self.validation))} for validation"


def read_texts(recipe: Recipe) -> Texts | None:
    """The texts of the recipe's domain, None without one.

    Raises what `read_rows` raises, and UsageError for an empty file or rows that are not plain text.
    """
    if recipe.domain is None:
        return None
    data = recipe.domain.data
    return Texts(_texts(data.train), None if data.validation is None else _texts(data.validation))


def _texts(source: str) -> list[str]:
    path = Path(source)
    if path.suffix.lower() == PLAIN_SUFFIX and path.is_file():
        text = read_text(path)
        if not text.strip():
            raise UsageError(f"{source} is empty", "put text in it")
        return [text]
    texts = []
    for row in read_rows(source):
        if row.text is None:
            raise UsageError(f"{row.where}: is no plain text", "give rows of text alone, or a .txt file")
        texts.append(row.text)
    return texts


def window_of(recipe: Recipe, header: GgufHeader) -> int:
    """Tokens of a window of the domain's text; UsageError when that is more than the base was trained for."""
    most = base_context_length(header)
    asked = None if recipe.domain is None else recipe.domain.window
    if asked is not None and asked > most:
        message = f"domain.window {asked} is more than the {most} tokens that {recipe.base!r} can take"
        raise UsageError(message, f"give at most {most}")
    return asked or min(recipe.context_length, most)


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[Example]:
    """The texts as windows of at most `length` tokens, of which all but the first are learned.

    The windows of a text overlap by one token, so that each of its tokens is learned once, but for the first.
    """
    cut: list[tuple[int, ...]] = []
    for text in texts:
        tokens = tokenizer.tokenize(text)
        cut += [tuple(tokens[start : start + length]) for start in range(0, len(tokens) - 1, length - 1)]
    return [Example(tokens, (False, *[True] * (len(tokens) - 1)), 1) for tokens in cut]


def split_windows(
    texts: Texts, tokenizer: Tokenizer, length: int, held_out: float
) -> tuple[list[Example], list[Example]]:
    """Windows for training and for validation; UsageError when there are too few.

    Without texts for validation the last windows are held out: neighbours are alike, and should not be on both sides.
    """
    train = windows_of(texts.train, tokenizer, length)
    validation = windows_of(texts.validation or (), tokenizer, length)
    if texts.validation is None:
        if len(train) < 2:
            message = f"the domain's text has fewer than 2 windows of {length} tokens, so that none can be held out"
            raise UsageError(message, "give domain.data.validation a file, more text, or a smaller domain.window")
        count = min(max(1, round(held_out * len(train))), len(train) - 1)
        return train[:-count], train[-count:]
    if not train or not validation:
        which = "validation" if train else "train"
        raise UsageError(f"domain.data.{which} has one token, and nothing to learn", "give it a longer text")
    return train, validation
