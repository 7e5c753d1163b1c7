"""Recipe in, what `edgetune validate` found out: its base, its board and the rows of each adapter. No torch."""

from __future__ import annotations

from typing import Any

from edgetune_runtime.errors import EdgetuneError

from . import bases, plan
from .data import read_rows, split
from .metrics import metric_for
from .recipe import AdapterSpec, Recipe


def check(recipe: Recipe) -> dict[str, Any]:
    """Read the header of the recipe's base and all rows of its data, and see whether its board can hold the bundle.

    Returns JSON values: `name`, `base`, `architecture` and `board` (None where they are not known before a build), and
    `adapters` with the metric, the numbers of training and validation rows and of labels. Raises one error for all
    problems, with the exit code of the first.
    """
    problems: list[EdgetuneError] = []
    found: dict[str, Any] = {"name": recipe.name, "base": recipe.base, "architecture": None, "board": None}
    try:
        found |= _check_base(recipe)
    except EdgetuneError as error:
        problems.append(error)
    found["adapters"] = {}
    for name, spec in recipe.adapters.items():
        try:
            found["adapters"][name] = _check_adapter(spec, spec.training_for(recipe).seed)
        except EdgetuneError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return found


def _check_base(recipe: Recipe) -> dict[str, Any]:
    header = bases.describe(recipe)
    if header is None:
        return {"board": recipe.device}
    chosen = plan.choose_for(recipe, header, requantize=bases.requantizes(recipe))
    return {"architecture": header.architecture, "board": None if chosen is None else chosen.reason}


def _check_adapter(spec: AdapterSpec, seed: int) -> dict[str, Any]:
    train = read_rows(spec.data.train, spec.data.columns, labels=spec.labels)
    metric = metric_for(spec.metric, train, spec.labels)
    labels = spec.labels
    if metric == "label" and labels is None:
        labels = tuple(sorted({row.completion for row in train if row.completion is not None}))
    if spec.data.validation is None:
        train, validation = split(train, spec.data.held_out, seed)
    else:
        validation = read_rows(spec.data.validation, spec.data.columns, labels=labels)
    counts = {"train": len(train), "validation": len(validation)}
    return {"metric": metric, **counts, **({"labels": len(labels)} if labels else {})}
