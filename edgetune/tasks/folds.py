"""Makes the tasks of adapters that are trained without a part of the rows, and tell how sure the answers to it are.

This is cross-fitting, for tasks of so few rows that too few are held out for validation.
"""

from __future__ import annotations

from dataclasses import replace

from edgetune_runtime.errors import UsageError

from .metrics import answers_to_score
from .negatives import given, is_made
from .plain_prompts import answered_prompts, plain_prompt
from .splitting import folds_of
from .task import Task


def fold_tasks(task: Task) -> list[Task]:
    """A task for each of its `confidence_folds`, whose rows it is not trained on; none without this option.

    Its validation rows are those of the fold and those that the build made, none of which chooses its checkpoint.
    Raises UsageError for too few rows.
    """
    count = task.spec.confidence_folds
    if count is None:
        return []
    try:
        folds = folds_of(given(task.train), count, task.training.seed)
    except UsageError as error:
        remedy = f"{error.remedy}, or remove it"
        raise UsageError(f"adapters.{task.name}.confidence_folds: {error.message}", remedy) from error
    made = [*filter(is_made, task.validation)]
    tasks = []
    for number, fold in enumerate(folds, 1):
        left_out = {row.where for row in fold}
        train = [row for row in task.train if row.where not in left_out]
        copies = [copy for copy in task.copies if copy.source.where not in left_out]
        part = replace(task, name=f"{task.name}~{number}", train=train, copies=copies, validation=[*fold, *made])
        learned = answered_prompts(part.trained_rows)
        unseen = [row for row in part.validation if plain_prompt(row) not in learned]
        tasks.append(replace(part, confidence_rows=answers_to_score(unseen, task.metric, train)))
    return tasks
