"""The prompts that a router learns from: those of the tasks, and those of none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import UsageError
from edgetune_runtime.routing.router import last_user_text

from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task

GENERAL_REQUESTS = Path(__file__).with_name("general_requests.txt").read_text(encoding="utf-8").splitlines()
"""What people ask an assistant, written for edgetune: prompts of no task."""
_SHARE_SCRAMBLED, _SHORTEST_SCRAMBLED = 0.7, 4


@dataclass(frozen=True)
class TaskPrompts:
    """The different prompts of a task, and whether the adapter has labels to choose from."""

    name: str
    has_labels: bool
    train: Sequence[str]
    validation: Sequence[str]


def prompts_of(task: Task) -> TaskPrompts:
    """The prompts of a task's rows; UsageError for a row without one."""
    return TaskPrompts(task.name, bool(task.labels), _texts(task, task.train), _texts(task, task.validation))


def scrambled(prompts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Prompts that keep the form and the short words of the tasks' ones: the letters of most others are shuffled."""

    def word(text: str) -> str:
        shuffles = len(text) >= _SHORTEST_SCRAMBLED and rng.random() < _SHARE_SCRAMBLED
        return "".join(rng.sample(text, len(text))) if shuffles else text

    return [" ".join(map(word, prompt.split(" "))) for prompt in rng.sample(prompts, min(count, len(prompts)))]


def _texts(task: Task, rows: Sequence[TaskRow]) -> list[str]:
    texts = dict.fromkeys(last_user_text(list(row.messages or ())) for row in rows)
    if "" in texts:
        row = next(row for row in rows if not last_user_text(list(row.messages or ())))
        message = f"{row.where}: has no message of the user, by which a router could choose adapter {task.name!r}"
        raise UsageError(message, "list the other adapters as route.adapters, or remove route")
    return list(texts)
