"""Makes the tasks of adapters that are trained without a part of the rows, and tell how sure the answers to it are.

This is cross-fitting, for tasks of so few rows that too few are held out for validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetune_runtime.errors import UsageError

from edgetune.recipe.model import Recipe

from .confidence import MIN_ROWS
from .data import TaskRow
from .negatives import given, is_made, letters_of
from .plain_prompts import answered_prompts
from .splitting import folds_of
from .task import Task, with_copies

SEPARATOR = "~"
"""Between the name of a task and the number of a fold; no adapter of a recipe has it in its name."""


def fold_tasks(task: Task, recipe: Recipe) -> list[Task]:
    """A task for each of its `confidence_folds`, which learns nothing of its rows; none without this option.

    Its validation rows are those of the fold, and a part of those that the build made; none chooses its checkpoint.
    Raises UsageError for too few rows.
    """
    count = task.spec.confidence_folds
    if count is None:
        return []
    try:
        folds = folds_of(given(task.train), count, task.training.seed, task.metric)
        tasks = [_without(fold, number, task, recipe) for number, fold in enumerate(folds, 1)]
        _check_enough([task, *tasks])
    except UsageError as error:
        remedy = f"{error.remedy}, or remove it"
        raise UsageError(f"adapters.{task.name}.confidence_folds: {error.message}", remedy) from error
    return tasks


def _without(fold: Sequence[TaskRow], number: int, task: Task, recipe: Recipe) -> Task:
    """The task that does not learn `fold`, neither as copies of other rows nor with its letters shuffled."""
    left_out, letters = {row.where for row in fold}, {*map(letters_of, fold)}
    own = [row for row in given(task.train) if row.where not in left_out]
    judged = [*given(task.validation), *task.confidence_rows, *fold]
    part = with_copies(replace(task, train=own, validation=judged, copies=()), recipe)
    made = [row for row in task.train if is_made(row) and letters_of(row) not in letters]
    asked = [*filter(is_made, task.validation)][number - 1 :: task.spec.confidence_folds]
    part = replace(part, name=f"{task.name}{SEPARATOR}{number}", train=[*own, *made], validation=[*fold, *asked])
    learned, rated = answered_prompts(part.trained_rows), {row.where for row in task.confidence_rows}
    return replace(part, confidence_rows=task.unseen([*fold, *(row for row in asked if row.where in rated)], learned))


def _check_enough(tasks: Sequence[Task]) -> None:
    """UsageError where all answers of the task and its folds together are too few for a confidence."""
    count = sum(len(task.in_scope(task.confidence_rows)) for task in tasks)
    if count < MIN_ROWS:
        raise UsageError(f"{count} rows are too few for a confidence", f"give {MIN_ROWS} or more")
