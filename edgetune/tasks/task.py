"""Reads the data of a recipe: rows, labels and metric of each task, and the text of its domain. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError

from edgetune import task_types
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, Metric, TrainingSpec
from edgetune.recipe.rows import Rows

from .augmentation.copies import ChangedRow, copies_of
from .data import TaskRow, read_rows, read_text, split
from .metrics import metric_for
from .tokenization import tokenize_rows

PLAIN_SUFFIX = ".txt"
_SAMPLE_CHARACTERS = 80
_ANY_PROMPT = "hello"
Reader = Callable[..., list[TaskRow]]
"""Reads the rows of a source, as `read_rows` does."""


@dataclass(frozen=True)
class Task:
    """The task of one adapter, with its data; `copies` are changed copies of `train`, which are trained on too."""

    name: str
    spec: AdapterSpec
    training: TrainingSpec
    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    labels: tuple[str, ...]
    metric: Metric
    copies: Sequence[ChangedRow] = ()

    @property
    def trained_rows(self) -> list[TaskRow]:
        """The training rows and their changed copies."""
        return [*self.train, *(copy.row for copy in self.copies)]

    @property
    def sample_prompt(self) -> str:
        """The last turn before the answer of a validation row: a short one that no command takes for an option."""
        rows = self.validation
        texts = (row.text if row.messages is None else str(row.messages[-1]["content"]) for row in rows)
        fitting = (text for text in texts if text and len(text) <= _SAMPLE_CHARACTERS and not text.startswith("-"))
        return " ".join(next(fitting, _ANY_PROMPT).split())

    def tokenize(self, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Example], list[Example], tuple[str, ...]]:
        """The training and the validation examples, and where the rows of both are that are too long and left out."""

        def of(rows: Sequence[TaskRow]) -> tuple[list[Example], tuple[str, ...]]:
            loss_on = self.spec.data.loss_on
            return tokenize_rows(rows, tokenizer, system=self.spec.system, loss_on=loss_on, max_tokens=max_tokens)

        (train, long_train), (validation, long_validation) = of(self.trained_rows), of(self.validation)
        return train, validation, long_train + long_validation


def read_task(name: str, recipe: Recipe, read: Reader = read_rows) -> Task:
    """Read the data of the recipe's adapter `name`; raises the errors of `read_rows`, or of `read`, and of `split`."""
    spec = recipe.adapters[name]
    training = recipe.training.under(spec.training)
    train = read(spec.data.train, spec.data.columns, labels=spec.labels)
    metric = task_types.load(recipe.task).metric or metric_for(spec.metric, train, spec.labels)
    labels = spec.labels or ()
    if metric == "label" and not labels:
        labels = tuple(sorted({row.completion for row in train if row.completion is not None}))
    if spec.data.validation is None:
        train, validation = split(train, spec.data.held_out, training.seed)
    else:
        validation = read(spec.data.validation, spec.data.columns, labels=labels or None)
    task = Task(name, spec, training, train, validation, labels, metric)
    return task if spec.data.augment is None else _augmented(task, recipe, read)


def _augmented(task: Task, recipe: Recipe, read: Reader) -> Task:
    """The task with changed copies of its training rows; UsageError for options that do not fit the rows."""
    options, output = task.spec.data.augment, task.spec.output
    assert options is not None
    others = []
    if options.negatives is not None:
        specs = [spec.data for name, spec in recipe.adapters.items() if name != task.name]
        others = [row for data in specs for row in read(data.train, data.columns)]
    spec = None if output is None else output.spec
    try:
        copies = copies_of(
            task.train,
            options,
            schema=json.loads(spec.text) if spec is not None and spec.kind == "schema" else None,
            validation=task.validation,
            others=others,
            seed=task.training.seed,
        )
    except UsageError as error:
        raise UsageError(f"adapters.{task.name}.{error.message}", error.remedy) from error
    return replace(task, copies=copies)


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
