"""Reads the data of a task: rows for training and validation, labels and metric. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune_runtime.engines.base import Tokenizer

from edgetune.objectives.example import Example

from . import task_types
from .data import TaskRow, read_rows, split
from .metrics import metric_for
from .recipe.model import Recipe
from .recipe.parts import AdapterSpec, Metric, TrainingSpec
from .tokenization import TooLong, tokenize_rows

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
    return Task(name, spec, training, train, validation, labels, metric)
