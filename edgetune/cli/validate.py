"""`edgetune validate`: checks the base, the board and the rows of each adapter. Needs torch only for int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import EdgetuneError

from edgetune import builders
from edgetune.domain.texts import read_texts
from edgetune.outputs.resolve import check_output
from edgetune.recipe.model import Recipe
from edgetune.tasks import Task, read_task
from edgetune.training.precision import check_precision


def check(recipe: Recipe, out: Path | None = None) -> dict[str, Any]:
    """Read the header of the recipe's base and all rows of its data; check that the bundle fits the board.

    Also checks that this machine has the memory and disk to build it at `out`, by default `recipe.default_out`.

    Returns JSON values: `name`, `base`, `architecture`, `board` and `needs` (None if they are not known before a
    build), `domain` (if the recipe has one), and `adapters` with the metric and the numbers of training rows,
    validation rows and labels. Raises one error for all problems, with the exit code of the first.
    """
    problems: list[EdgetuneError] = []
    builder = builders.load(recipe.task)
    nothing = dict.fromkeys(("architecture", "board", "needs"))
    found: dict[str, Any] = {"name": recipe.name, "base": recipe.base, **nothing}
    with _collected(problems):
        found |= builder.describe(recipe)
    with _collected(problems):
        builder.check_methods(recipe)
    with _collected(problems):
        check_precision(recipe, _device)
    with _collected(problems):
        texts = read_texts(recipe)
        found |= {} if texts is None else {"domain": str(texts)}
    found["adapters"], tasks = {}, list[Task]()
    for name in recipe.adapters:
        with _collected(problems):
            tasks.append(read_task(name, recipe))
            found["adapters"][name] = _counts(tasks[-1])
            check_output(tasks[-1])
    # With problems, the needs do not matter.
    if not problems:
        found["needs"] = builder.needs(recipe, tasks, out or recipe.default_out)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return found


@contextmanager
def _collected(problems: list[EdgetuneError]) -> Iterator[None]:
    """Add what is raised to the problems, and go on."""
    try:
        yield
    except EdgetuneError as error:
        problems.append(error)


def _device() -> str:
    from edgetune.training.hardware import processes  # noqa: PLC0415 - torch, which nothing else here needs

    return str(processes().device.type)


def _counts(task: Task) -> dict[str, Any]:
    counts = {"metric": task.metric, "train": len(task.train), "validation": len(task.validation)}
    return {**counts, "labels": len(task.labels)} if task.labels else counts
