"""Trains the adapters of a build that do not ship: each without a fold of the rows, to which it then gives answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from edgetune.common.progress import Progress
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import B, Prepared, TrainedAdapter
from edgetune.tasks.folds import fold_tasks
from edgetune.training.jobs import train_all

FOLDS = "folds"
"""Their folder in the work folder of a build."""


def train_folds(
    builder: Builder[B], prepared: Prepared[B], base: B, work: Path, progress: Progress
) -> list[TrainedAdapter]:
    """Train an adapter in `work` without each fold of the adapters that have `confidence_folds`, with their options.

    Raises what `fold_tasks` and a training raise.
    """
    parts = [(item, task) for item in prepared.adapters for task in fold_tasks(item.task)]
    if not parts:
        return []
    plan = prepared.plan.with_adapters({task.name: replace(item.plan, name=task.name) for item, task in parts})
    jobs = builder.jobs(plan, [task for _, task in parts], base, Progress(quiet=True))
    progress.say(f"training {len(jobs)} adapters without a part of the rows each, for the confidence")
    load = partial(builder.load_torch, base)
    results = train_all([item.job for item in jobs], base.name, load, work, progress, plots=False)
    trained = [item.trained(results[item.plan.name], work) for item in jobs]
    return [
        replace(adapter, golden_rows=(), fold_of=whole.plan.name)
        for (whole, _), adapter in zip(parts, trained, strict=True)
    ]
