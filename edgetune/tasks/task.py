"""Reads the data of a recipe: rows, labels and metric of each task, and the text of its domain. No torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.inference.routing.router import last_user_text
from edgetune_runtime.wording import suggestion

from edgetune.objectives.example import Example
from edgetune.recipe.data import DataSpec, NegativesSpec
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, Metric
from edgetune.recipe.rows import Rows
from edgetune.recipe.training import TrainingSpec

from .augmentation.copies import ChangedRow, copies_of
from .confidence import MIN_ROWS
from .data import TaskRow, read_rows
from .metrics import (
    EITHER_RIGHT_OR_WRONG,
    answers_to_score,
    asked,
    check_answered,
    form_doubt,
    is_scorable,
    label_doubts,
    labels_in,
    metric_for,
)
from .negatives import foreign_texts, given, is_made, negative_rows
from .plain_prompts import answered_prompts, plain_prompt
from .row_files import entries, read_text
from .splitting import halves, split
from .tokenization import tokenize_rows

PLAIN_SUFFIX = ".txt"
_APART_FROM = 200
"""Validation rows from which half of them are enough to choose a checkpoint, and half to fit the confidence."""
_SAMPLE_CHARACTERS = 80
_ANY_PROMPT = "hello"
Reader = Callable[..., list[TaskRow]]
"""Reads the rows of a source, as `read_rows` does."""


@dataclass(frozen=True)
class Task:
    """The task of one adapter, with its data; `copies` are changed copies of `train`, which are trained on too.

    Of the validation rows, those of `choosing` choose the checkpoint. The confidence of answers is fitted on
    `confidence_rows`; there are none if the answers are to have no confidence. `doubts` say what is odd about the rows.
    A plan adds the tasks of its `folds` (see `fold_tasks`).
    """

    name: str
    spec: AdapterSpec
    training: TrainingSpec
    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    labels: tuple[str, ...]
    metric: Metric
    choosing: Sequence[TaskRow]
    confidence_rows: Sequence[TaskRow] = ()
    copies: Sequence[ChangedRow] = ()
    doubts: tuple[str, ...] = ()
    folds: Sequence[Task] = ()

    @property
    def trained_rows(self) -> list[TaskRow]:
        """The training rows and their changed copies."""
        return [*self.train, *(copy.row for copy in self.copies)]

    @property
    def validation_answers(self) -> list[TaskRow]:
        """The validation rows that people wrote, with the earlier answers of conversations that were not trained on."""
        return self.scored(given(self.validation), answered_prompts(self.trained_rows))

    def scored(self, rows: Sequence[TaskRow], learned: Collection[str]) -> list[TaskRow]:
        """The answers of the rows that the metric can score, without earlier ones to plain prompts that are learned."""
        return answers_to_score([row for row in rows if is_scorable(row, self.metric)], self.metric, learned)

    def unseen(self, rows: Sequence[TaskRow], learned: Collection[str]) -> list[TaskRow]:
        """The answers of the rows that the metric can score, to plain prompts that are not learned."""
        return [answer for answer in self.scored(rows, learned) if plain_prompt(answer) not in learned]

    @property
    def sample_prompt(self) -> str:
        """What a user says in a validation row: a short text that no command takes for an option."""
        texts = (last_user_text(list(row.messages)) if row.messages else row.prompt for row in self.validation)
        lines = (" ".join((text or "").split()) for text in texts)
        fitting = (line for line in lines if 0 < len(line) <= _SAMPLE_CHARACTERS and not line.startswith("-"))
        return next(fitting, _ANY_PROMPT)

    @property
    def compared_rows(self) -> list[TaskRow]:
        """The training rows that a prompt to classify is compared with, if its label has a confidence or a scope."""
        has_confidence = self.spec.confidence_folds is not None or len(self.confidence_rows) >= MIN_ROWS
        is_compared = self.metric == "label" and (has_confidence or self.spec.out_of_scope is not None)
        return self.in_scope(self.train) if is_compared else []

    def in_scope(self, rows: Sequence[TaskRow]) -> list[TaskRow]:
        """The rows that have one of the task's own labels, or none."""
        scope = self.spec.out_of_scope
        return [row for row in rows if scope is None or row.completion != scope.label]

    def tokenize(self, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Example], list[Example], tuple[str, ...]]:
        """The training and the validation examples, and where the rows of both are that are too long and left out."""

        def of(rows: Sequence[TaskRow]) -> tuple[list[Example], tuple[str, ...]]:
            loss_on = self.spec.data.loss_on
            return tokenize_rows(rows, tokenizer, system=self.spec.system, loss_on=loss_on, max_tokens=max_tokens)

        (train, long_train), (validation, long_validation) = of(self.trained_rows), of(self.choosing)
        return train, validation, long_train + long_validation


def read_task(name: str, recipe: Recipe, read: Reader = read_rows) -> Task:
    """Read the data of the recipe's adapter `name`; raises the errors of `read_rows`, or of `read`, and of `split`."""
    spec = recipe.adapters[name]
    training = recipe.training.under(spec.training)
    labels = with_scope(spec, spec.labels or ())
    train = read(spec.data.train, spec.data.columns, labels=labels or None)
    _check_weight_column(spec.data)
    metric = recipe.task_type.metric or metric_for(spec.metric, train, labels)
    doubts = _doubts(spec, train, metric)
    if metric == "label":
        check_answered(train, metric)
        train = [replace(row, completion=(row.completion or "").strip()) for row in train]
        labels = labels or with_scope(spec, labels_in(train))
    if spec.data.validation is None:
        train, validation = split(train, spec.data.held_out, training.seed, metric)
    else:
        validation = read(spec.data.validation, spec.data.columns, labels=labels or None)
    train = _first(train, spec.data.rows, training.seed)
    own = spec.data.confidence if _has_confidence(spec, metric) else None
    sure = [] if own is None else read(own, spec.data.columns, labels=labels or None)
    if spec.metric != "auto":
        check_answered([*validation, *sure], metric)
    unscored = (*_unscored(validation, metric, "validation"), *_unscored(sure, metric, "confidence"))
    doubts += (*label_doubts(labels), *unscored, *_unused_system(spec.system, train))
    task = Task(name, spec, training, train, validation, labels, metric, validation, sure, doubts=doubts)
    task = with_copies(task, recipe)
    if spec.out_of_scope is not None:
        task = _with_negatives(task, recipe)
    return _with_confidence(task)


def _check_weight_column(data: DataSpec) -> None:
    """UsageError if the recipe names a column of weights that no training row has."""
    if data.columns is None or "weight" not in data.columns.model_fields_set:
        return
    names = {name: None for _, values in entries(data.train) if isinstance(values, dict) for name in values}
    if (column := data.columns.weight) not in names:
        raise UsageError(
            f"no row of {data.train} has {column!r}", f"correct columns.weight; {suggestion(column, [*names])}"
        )


def _doubts(spec: AdapterSpec, rows: Sequence[TaskRow], metric: Metric) -> tuple[str, ...]:
    """What is odd about the training rows, for which a metric was chosen."""
    doubt = form_doubt(rows) if spec.metric == "auto" and metric != "label" else None
    return () if doubt is None else (doubt,)


def _rows_apart(spec: AdapterSpec) -> list[TaskRow]:
    """The rows that the task keeps apart for a test, of which nothing is learned."""
    return [] if spec.data.apart is None else read_rows(spec.data.apart)


def with_copies(task: Task, recipe: Recipe) -> Task:
    """The task with changed copies of its training rows, if the recipe asks for them.

    Raises UsageError for options that do not fit the rows.
    """
    options, output = task.spec.data.augment, task.spec.output
    if options is None:
        return task
    judged, foreign = [*task.validation, *task.confidence_rows, *_rows_apart(task.spec)], []
    if options.negatives is not None:
        others = [read_rows(spec.data.train, spec.data.columns) for spec in recipe.others(task.name).values()]
        foreign = [text for texts in foreign_texts(others, [*task.train, *judged]) for text in texts]
    try:
        if options.negatives is not None:
            _check_negatives(options.negatives, task.labels, foreign)
        copies = copies_of(
            task.train,
            options,
            schema=None if output is None or output.spec is None else output.spec.schema,
            labels=task.labels,
            validation=judged,
            foreign=foreign,
            seed=task.training.seed,
        )
    except UsageError as error:
        raise UsageError(f"adapters.{task.name}.{error.message}", error.remedy) from error
    return replace(task, copies=copies)


def _check_negatives(negatives: NegativesSpec, labels: Sequence[str], foreign: Sequence[str]) -> None:
    """UsageError without prompts, and for an answer that is not a label, which `classify` would never give."""
    if not foreign and not negatives.prompts:
        message = "data.augment.negatives has no prompts, and the recipe no other adapter that is asked other things"
        raise UsageError(message, "give prompts that are not for this task as data.augment.negatives.prompts")
    if labels and negatives.completion not in labels:
        message = f"data.augment.negatives.completion is {negatives.completion!r}, which is not one of the labels"
        raise UsageError(message, "use out_of_scope instead, which adds a label, or give rows of this one")


def _unscored(rows: Sequence[TaskRow], metric: Metric, purpose: str) -> tuple[str, ...]:
    """What is odd about the rows for validation or the confidence."""
    odd = [row.where for row in rows if not is_scorable(row, metric)]
    if not odd:
        return ()
    return (f"{len(odd)} of {len(rows)} {purpose} rows, such as {odd[0]}, cannot be scored by {metric}",)


def _unused_system(system: str | None, rows: Sequence[TaskRow]) -> tuple[str, ...]:
    """That the recipe's system prompt is learned with none of the training rows."""
    if system is None or not {None, system}.isdisjoint(row.system for row in rows):
        return ()
    return ("all training rows have other system prompts than the recipe; set `system` to one of them, or remove it",)


def with_scope(spec: AdapterSpec, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels with the one of texts that are out of scope, if the adapter has any labels and asks for it."""
    extra = () if spec.out_of_scope is None or not labels else (spec.out_of_scope.label,)
    return tuple(dict.fromkeys((*labels, *extra)))


def _with_negatives(task: Task, recipe: Recipe) -> Task:
    """The task with generated rows that are out of scope, some for validation; UsageError if it has no labels.

    Those for validation choose no checkpoint, and are among the rows for the confidence, also if the recipe has its
    own for that without such texts.
    """
    assert task.spec.out_of_scope is not None
    if task.metric != "label":
        message = f"adapter {task.name!r} has out_of_scope, but no labels: its metric is {task.metric}"
        if doubt := form_doubt(task.train):
            raise UsageError(f"{message}: {doubt}", "correct these rows")
        raise UsageError(message, "set labels or `metric: label`, or remove out_of_scope")
    others = {}
    for name, spec in recipe.others(task.name).items():
        # Rows that cannot be read are reported by their own task.
        with suppress(EdgetuneError):
            others[name] = read_rows(spec.data.train, spec.data.columns)
    label, seed = task.spec.out_of_scope.label, task.training.seed
    own = task.confidence_rows
    excluded = [*own, *_rows_apart(task.spec)]
    learned, judged = negative_rows(task.train, task.validation, others, label, seed, excluded=excluded)
    if own and label not in {row.completion for row in own}:
        own = [*own, *judged]
    return replace(task, train=[*task.train, *learned], validation=[*task.validation, *judged], confidence_rows=own)


def _has_confidence(spec: AdapterSpec, metric: Metric) -> bool:
    return spec.confidence and metric in EITHER_RIGHT_OR_WRONG


def _with_confidence(task: Task) -> Task:
    """The task with the rows that the confidence of answers is fitted on, which are not training rows.

    Those whose prompts differ in case and punctuation alone count as the same, which is doubted without a confidence
    too. UsageError if given ones are training rows, and where no answer would have the confidence that `min_confidence`
    asks for.
    """
    spec, choosing, rows = task.spec, task.choosing, task.validation
    for key in ("confidence_folds", "min_confidence"):
        if getattr(spec, key) is not None and task.metric not in EITHER_RIGHT_OR_WRONG:
            message = f"adapter {task.name!r} has {key}, but {task.metric} scores no answer as right or wrong"
            raise UsageError(message, f"remove {key}, or set metric")
    has_confidence = _has_confidence(spec, task.metric)
    if not has_confidence:
        rows = []
    elif spec.data.confidence is not None:
        rows = task.confidence_rows
    elif len(choosing) >= _APART_FROM and not task.training.ignores_validation:
        choosing, rows = halves(choosing, task.training.seed, task.metric)
        rows += filter(is_made, task.validation)
    learned, shown = answered_prompts(task.trained_rows), given(rows if has_confidence else task.validation)
    both = [row.where for row in shown if plain_prompt(asked(row, task.metric)) in learned]
    if both and has_confidence and spec.data.confidence is not None:
        message = f"adapter {task.name!r}: {len(both)} of {len(rows)} confidence rows have the prompt of a training row"
        raise UsageError(f"{message}: {both[0]}", "remove them: a model is surer of what it has learned")
    doubts = task.doubts
    if both:
        share = f"{len(both)} of {len(shown)} validation rows have the prompt of a training row, such as {both[0]}"
        doubts += (share + ", and give no confidence" * has_confidence,)
    rows = task.unseen(rows, learned)
    if spec.min_confidence is not None and spec.confidence_folds is None:
        _check_enough(task.name, task.in_scope(rows))
    return replace(task, choosing=choosing, confidence_rows=rows, doubts=doubts)


def _check_enough(name: str, rows: Sequence[TaskRow]) -> None:
    """UsageError where no answer would have the confidence that `min_confidence` asks for."""
    if len(rows) < MIN_ROWS:
        message = f"adapter {name!r} has min_confidence, but {len(rows)} validation rows give none"
        remedy = f"give {MIN_ROWS} or more, which are not training rows, as data.validation or data.confidence"
        raise UsageError(message, f"{remedy}, or set confidence_folds: 5")


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
