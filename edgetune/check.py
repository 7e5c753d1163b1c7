"""Recipe in, what `edgetune validate` found out: its base, its board and the rows of each adapter. No torch."""

from __future__ import annotations

from typing import Any

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.errors import EdgetuneError

from . import bases, plan
from .encoder import base as encoder
from .recipe import Recipe
from .targets import check_shapes
from .tasks import Task, read_task
from .texts import read_texts, window_of


def check(recipe: Recipe) -> dict[str, Any]:
    """Read the header of the recipe's base and all rows of its data, and see whether its board can hold the bundle.

    Returns JSON values: `name`, `base`, `architecture` and `board` (None where they are not known before a build),
    `domain` (where there is one), and `adapters` with the metric, the numbers of training and validation rows and of
    labels. Raises one error for all problems, with the exit code of the first.
    """
    problems: list[EdgetuneError] = []
    found: dict[str, Any] = {"name": recipe.name, "base": recipe.base, "architecture": None, "board": None}
    try:
        found |= _check_base(recipe)
    except EdgetuneError as error:
        problems.append(error)
    try:
        check_shapes(recipe)
    except EdgetuneError as error:
        problems.append(error)
    try:
        texts = read_texts(recipe)
        found |= {} if texts is None else {"domain": str(texts)}
    except EdgetuneError as error:
        problems.append(error)
    found["adapters"] = {}
    for name in recipe.adapters:
        try:
            found["adapters"][name] = _counts(read_task(name, recipe))
        except EdgetuneError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return found


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
