"""Recipe in, what `edgetune validate` finds: base, board, rows of each adapter. No torch, unless int8 is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.errors import EdgetuneError

from edgetune import bases, plan
from edgetune import needs as build_needs
from edgetune.domain.texts import read_texts, window_of
from edgetune.encoder import base as encoder
from edgetune.recipe.model import Recipe
from edgetune.targets import check_shapes
from edgetune.tasks import Task, read_task
from edgetune.training.precision import check_precision


def check(recipe: Recipe, out: Path | None = None) -> dict[str, Any]:
    """Read the header of the recipe's base and all rows of its data, and see whether its board can hold the bundle.

    So must this machine be able to build it at `out`, by default `recipe.default_out`, with its memory and disk.

    Returns JSON values: `name`, `base`, `architecture`, `board` and `needs` (None where they are not known before a
    build), `domain` (where there is one), and `adapters` with the metric, the numbers of training and validation rows
    and of labels. Raises one error for all problems, with the exit code of the first.
    """
    problems: list[EdgetuneError] = []
    nothing = dict.fromkeys(("architecture", "board", "needs"))
    found: dict[str, Any] = {"name": recipe.name, "base": recipe.base, **nothing}
    with _collected(problems):
        found |= _check_base(recipe)
    with _collected(problems):
        check_shapes(recipe)
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
    # Where anything is wrong, what it would take is of no use.
    if not problems:
        found["needs"] = build_needs.told(recipe, tasks, build_needs.header_of(recipe), out or recipe.default_out)
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
    from edgetune.training.loop import processes  # noqa: PLC0415 - torch, which nothing else here needs

    return str(processes().device.type)


def _check_base(recipe: Recipe) -> dict[str, Any]:
    if recipe.task == CLASSIFICATION:
        return {"architecture": encoder.describe(recipe)}
    header = bases.describe(recipe)
    if header is None:
        return {"board": recipe.device}
    window_of(recipe, header)
    chosen = plan.choose_for(recipe, header, requantize=bases.requantizes(recipe))
    return {"architecture": header.architecture, "board": None if chosen is None else chosen.reason}


def _counts(task: Task) -> dict[str, Any]:
    counts = {"metric": task.metric, "train": len(task.train), "validation": len(task.validation)}
    return {**counts, "labels": len(task.labels)} if task.labels else counts
