"""The prompts of tasks that a router learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.routing.router import last_user_text

from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task


@dataclass(frozen=True)
class TaskPrompts:
    """The different prompts of a task, and whether the adapter has labels to choose from."""

    name: str
    has_labels: bool
    train: Sequence[str]
    validation: Sequence[str]


def prompts_of(task: Task) -> TaskPrompts:
    """The prompts of a task's rows; UsageError for a row without one, and for no validation row that is in scope."""
    train, validation = (_texts(task, task.in_scope(rows)) for rows in (task.train, task.validation))
    if not validation:
        message = f"adapter {task.name!r}: all validation rows are out of scope, so the router cannot be measured"
        raise UsageError(message, "give others as data.validation, or raise data.held_out")
    return TaskPrompts(task.name, bool(task.labels), train, validation)


def _texts(task: Task, rows: Sequence[TaskRow]) -> list[str]:
    texts = dict.fromkeys(last_user_text(list(row.messages or ())) for row in rows)
    if "" in texts:
        row = next(row for row in rows if not last_user_text(list(row.messages or ())))
        message = f"{row.where}: has no message of the user, by which a router could choose adapter {task.name!r}"
        raise UsageError(message, "list the other adapters as route.adapters, or remove route")
    return list(texts)
