"""Facts of tasks: one file per task that a recipe can name, with its TASK_TYPE."""

from __future__ import annotations

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import UsageError
from edgetune_runtime.registry import Registry
from edgetune_runtime.wording import suggestion

from .base import TaskType

__all__ = ["TaskType", "load", "names"]

_FILES = Registry(__name__, "task", shared=("base",))


def names() -> list[str]:
    """The names of all tasks, from the files of this package, the default first."""
    return sorted((name.replace("_", "-") for name in _FILES.names()), key=lambda task: (task != GENERATION, task))


def load(task: str) -> TaskType:
    """The facts of a task; UsageError for an unknown task."""
    if task not in names():
        raise UsageError(f"no task {task!r}", suggestion(task, names()))
    task_type: TaskType = _FILES.load(task.replace("-", "_")).TASK_TYPE
    return task_type
