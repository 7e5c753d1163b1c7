"""Reads the data of a recipe: rows, labels and metric of each task, and the text of its domain. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError

from edgetune import task_types
from edgetune.confidence import MIN_ROWS
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, Metric, TrainingSpec
from edgetune.recipe.rows import Rows

from .data import TaskRow, read_rows, read_text, split
from .metrics import EITHER_RIGHT_OR_WRONG, metric_for
from .tokenization import TooLong, tokenize_rows

PLAIN_SUFFIX = ".txt"
_APART_FROM = 200
"""Validation rows from which half of them are enough to choose a checkpoint, and half to fit the confidence."""
_SAMPLE_CHARACTERS = 80
_ANY_PROMPT = "hello"


@dataclass(frozen=True)
class Task:
    """The task of one adapter, with its data.

    Of the validation rows, those of `choosing` choose the checkpoint. The confidence of answers is fitted on
    `confidence_rows`; there are none if the answers are to have no confidence.
    """

    name: str
    spec: AdapterSpec
    training: TrainingSpec
    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    labels: tuple[str, ...]
    metric: Metric
    choosing: Sequence[TaskRow]
    confidence_rows: Sequence[TaskRow]

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

        (train, long_train), (validation, long_validation) = of(self.train), of(self.choosing)
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
    choosing, rows = validation, validation
    if not spec.confidence or metric not in EITHER_RIGHT_OR_WRONG:
        rows = []
    elif spec.data.confidence is not None:
        rows = read_rows(spec.data.confidence, spec.data.columns, labels=labels or None)
        _check_apart(name, rows, train)
    elif len(validation) >= _APART_FROM:
        choosing, rows = validation[::2], validation[1::2]
    if spec.min_confidence is not None:
        _check_enough(name, rows, metric)
    return Task(name, spec, training, train, validation, labels, metric, choosing, rows)


def _check_enough(name: str, rows: Sequence[TaskRow], metric: Metric) -> None:
    """UsageError where no answer would have the confidence that `min_confidence` asks for."""
    if metric not in EITHER_RIGHT_OR_WRONG:
        message = f"adapter {name!r} has min_confidence, but {metric} scores no answer as right or wrong"
        raise UsageError(message, "remove min_confidence, or set metric")
    if len(rows) < MIN_ROWS:
        message = f"adapter {name!r} has min_confidence, but {len(rows)} validation rows give none"
        raise UsageError(message, f"give {MIN_ROWS} or more as data.validation or data.confidence")


def _check_apart(name: str, rows: Sequence[TaskRow], train: Sequence[TaskRow]) -> None:
    """UsageError for confidence rows that are training rows."""
    learned = {_prompt_of(row) for row in train}
    both = [row.where for row in rows if _prompt_of(row) in learned]
    if both:
        message = f"adapter {name!r}: {len(both)} of {len(rows)} confidence rows have the prompt of a training row"
        raise UsageError(f"{message}: {both[0]}", "remove them: a model is surer of what it has learned")


def _prompt_of(row: TaskRow) -> str:
    return repr((row.messages, row.text))


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
