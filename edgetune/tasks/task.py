"""Reads the data of a recipe: rows, labels and metric of each task, and the text of its domain. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError

from edgetune import task_types
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, Metric, TrainingSpec
from edgetune.recipe.rows import Rows

from .data import TaskRow, read_rows, read_text, split
from .metrics import metric_for
from .tokenization import TooLong, tokenize_rows

PLAIN_SUFFIX = ".txt"
_SAMPLE_CHARACTERS = 80
_ANY_PROMPT = "hello"


@dataclass(frozen=True)
class Task:
    """The task of one adapter, with its data."""

    name: str
    spec: AdapterSpec
    training: TrainingSpec
    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    labels: tuple[str, ...]
    metric: Metric

    @property
    def sample_prompt(self) -> str:
        """The last turn before the answer of a validation row: a short one that no command takes for an option."""
        rows = self.validation
        texts = (row.text if row.messages is None else str(row.messages[-1]["content"]) for row in rows)
        fitting = (text for text in texts if text and len(text) <= _SAMPLE_CHARACTERS and not text.startswith("-"))
        return " ".join(next(fitting, _ANY_PROMPT).split())

    def tokenize(self, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Example], list[Example], TooLong]:
        """Tokenize into training and validation examples, without the rows of both that are too long."""

        def of(rows: Sequence[TaskRow]) -> tuple[list[Example], TooLong]:
            loss_on = self.spec.data.loss_on
            return tokenize_rows(rows, tokenizer, system=self.spec.system, loss_on=loss_on, max_tokens=max_tokens)

        (train, long_train), (validation, long_validation) = of(self.train), of(self.validation)
        where = (*long_train.examples, *long_validation.examples)[:3]
        return train, validation, TooLong(long_train.count + long_validation.count, where)


def read_task(name: str, recipe: Recipe) -> Task:
    """Read the data of the recipe's adapter `name`; raises the errors of `read_rows` and `split`."""
    spec = recipe.adapters[name]
    training = recipe.training.under(spec.training)
    train = read_rows(spec.data.train, spec.data.columns, labels=spec.labels)
    metric = task_types.load(recipe.task).metric or metric_for(spec.metric, train, spec.labels)
    labels = spec.labels or ()
    if metric == "label" and not labels:
        labels = tuple(sorted({row.completion for row in train if row.completion is not None}))
    if spec.data.validation is None:
        train, validation = split(train, spec.data.held_out, training.seed)
    else:
        validation = read_rows(spec.data.validation, spec.data.columns, labels=labels or None)
    return Task(name, spec, training, _first(train, spec.data.rows, training.seed), validation, labels, metric)


def _first(rows: list[TaskRow], count: int | None, seed: int) -> list[TaskRow]:
    """`count` of the rows in a random order, so that more rows contain all of fewer; all rows in theirs without one."""
    return rows if count is None else random.Random(seed).sample(rows, len(rows))[:count]


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
