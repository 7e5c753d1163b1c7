"""Estimates how long a recipe trains on this machine, from ten steps of its first adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgetune_runtime.errors import CancelledError

from edgetune.building import builders
from edgetune.building.plan import with_download
from edgetune.common.progress import Progress
from edgetune.common.work_folder import locked, work_folder
from edgetune.methods.common.peft import ALL_LINEAR
from edgetune.methods.lora import LoraOptions
from edgetune.planning.records import BuildPlan, PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.training.duration import TRIAL_STEPS, duration, tokens_left
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all


def run(recipe: Recipe, planned: PlannedBuild, out: Path, progress: Progress) -> tuple[BuildPlan, dict[str, Any]]:
    """Train ten steps; returns the plan, which knows a base that was downloaded, and what was measured:
    `tokens_per_s`, `training_s` (seconds, all adapters at this speed) and a `summary`.

    Continued pretraining and the choice of target modules come on top, which the summary says. A converted or quantized
    base stays in `<out>.work` for the build of `out`; nothing else is left. Raises what a build raises, and UsageError
    for a task without a trial.
    """
    recipe.task_type.check_offers("trial", "--trial")
    if planned.plan.source is None:
        planned = with_download(planned, out)
    builder, plan = builders.load(recipe.task), planned.plan
    work = work_folder(out)
    with locked(work):
        base = builder.make_base(plan, work, progress, None)
    items = builder.jobs(plan, planned.tasks, base, progress)
    first = items[0].job
    with unsaved() as folder:
        load = partial(builder.load_torch, base)
        result = train_all([short_job(first)], base.name, load, folder, progress, plots=False)[first.name]
    left = sum(
        item.plan.trainings * tokens_left(item.job.train, item.job.loss_rows, item.job.training) for item in items
    )
    seconds = left / result.tokens_per_s
    summary = f"training takes about {duration(seconds)} at the {result.tokens_per_s:.0f} tokens/s of {first.name}"
    more = ["continued pretraining"] if recipe.domain is not None else []
    if any(adapter.method.is_auto for adapter in recipe.adapters.values()):
        more.append("the choice of target_modules")
    summary += f", without {' and '.join(more)}" if more else ""
    measured = {"summary": summary, "tokens_per_s": round(result.tokens_per_s, 1), "training_s": round(seconds)}
    return plan, measured


@contextmanager
def unsaved() -> Iterator[Path]:
    """A folder for trainings that is deleted after the block, so that interrupted ones cannot be resumed."""
    with TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except CancelledError as error:
            raise CancelledError("interrupted") from error


def short_job(job: TrainingJob[Any]) -> TrainingJob[Any]:
    """The first steps of a training, to measure its speed."""
    options = job.options
    if isinstance(options, LoraOptions) and options.is_auto:
        options = options.placed(ALL_LINEAR, options.r)
    training = job.training.model_copy(update={"max_steps": TRIAL_STEPS, "evals": 1, "patience": None})
    return replace(job, options=options, training=training, validation=job.loss_rows[:1])
