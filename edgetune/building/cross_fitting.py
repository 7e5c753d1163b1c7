"""Adapters of a build that do not ship: each is trained without a fold of the rows, to which it then gives answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from edgetune.common.progress import Progress
from edgetune.planning.adapters import with_options
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import B, Prepared, PreparedAdapter
from edgetune.tasks.folds import SEPARATOR


def fold_adapters(builder: Builder[B], planned: BuildPlan, prepared: Prepared[B], base: B) -> list[PreparedAdapter]:
    """The adapters to train without each fold of those that have `confidence_folds`, with their options.

    Options with tokens are as in `planned`: the prepared ones may have those of a row that a fold is without.
    """
    parts = [
        (_with_given_tokens(item.plan, planned.adapters[item.plan.name]), task)
        for item in prepared.adapters
        for task in item.task.folds
    ]
    plan = prepared.plan.with_adapters({task.name: replace(whole, name=task.name) for whole, task in parts})
    items = builder.jobs(plan, [task for _, task in parts], base, Progress(quiet=True)) if parts else []
    return [replace(item, fold_of=whole.name) for (whole, _), item in zip(parts, items, strict=True)]


def _with_given_tokens(prepared: AdapterPlan, planned: AdapterPlan) -> AdapterPlan:
    given = {name: getattr(planned.options, name) for name in planned.options.token_options}
    base = None if prepared.trained is None else prepared.trained.base
    return with_options(prepared, prepared.options.model_copy(update=given), base)


def trainings(folder: Path, names: Iterable[str]) -> list[Path]:
    """Where the adapters of these names, and those without their folds, are trained in `folder`."""
    return [path for name in names for path in (folder / name, *folder.glob(f"{name}{SEPARATOR}*"))]
