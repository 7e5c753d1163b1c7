"""Rows of a task with the corrections in a log: for training, and for the comparison of both adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.answer_log.log import LoggedAnswer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import suggestion

from edgetune.recipe.rows import Rows
from edgetune.tasks import metrics
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task

MIN_CORRECTIONS = 4
"""Fewest corrections of an adapter to learn from; a part of them is held out."""
_HELD_OUT_PARTS = 4
"""One of so many parts of the corrections is not learned, but only compared."""


@dataclass(frozen=True)
class LearnedRows:
    """The rows of a task with corrections: those to learn, old validation rows, and corrections that are held out.

    `learned` of the rows in `train` are corrections.
    """

    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    held_out: Sequence[TaskRow]
    learned: int


def learned_rows(task: Task, entries: Sequence[LoggedAnswer]) -> LearnedRows:
    """The rows of `task` with those of its corrected answers.

    A correction takes the place of training rows with its prompt, and of earlier corrections of it. One whose prompt is
    that of a validation row is left out. Raises one UsageError for all corrections that cannot be answers of the task.
    """
    _check(task, entries)
    validation_prompts = {row.prompt_key for row in task.validation}
    rows = {row.prompt_key: row for row in map(_row, entries)}
    new = [row for prompt, row in rows.items() if prompt not in validation_prompts]
    if len(new) < MIN_CORRECTIONS:
        message = f"the log has {len(new)} corrected answers of adapter {task.name!r} to new prompts"
        raise UsageError(f"{message}, fewer than {MIN_CORRECTIONS}", "correct more answers, or label some with --ask N")
    held_out = new[::_HELD_OUT_PARTS]
    learned = [row for number, row in enumerate(new) if number % _HELD_OUT_PARTS]
    corrected = {row.prompt_key for row in new}
    kept = [row for row in task.in_scope(task.train) if row.prompt_key not in corrected]
    return LearnedRows([*kept, *learned], task.in_scope(task.validation), held_out, len(learned))


def values_of(name: str, rows: Sequence[TaskRow]) -> Rows:
    """The rows in a form that needs no columns in a recipe."""
    return Rows.of(name, map(_values, rows))


def _values(row: TaskRow) -> dict[str, Any]:
    if row.messages is None:
        return {"text": row.text, "weight": row.weight}
    turn = row.turn or {"role": "assistant", "content": row.completion}
    tools = {} if row.tools is None else {"tools": row.tools.definitions}
    return {"messages": [*map(dict, row.messages), dict(turn)], **tools, "weight": row.weight}


def _row(entry: LoggedAnswer) -> TaskRow:
    return TaskRow(f"log:{entry.id}", entry.messages, entry.correction)


def _check(task: Task, entries: Sequence[LoggedAnswer]) -> None:
    problems = []
    for entry in entries:
        answer = entry.correction or ""
        try:
            metrics.score(task.metric, [answer], [answer])
        except UsageError as error:
            problems.append(f"answer {entry.id}: {error.message}")
        if task.metric == "label" and answer not in task.labels:
            problem = f"the correction {answer!r} is not one of the labels"
            problems.append(f"answer {entry.id}: {problem}; {suggestion(answer, task.labels)}")
    if problems:
        raise UsageError("\n".join(problems))
