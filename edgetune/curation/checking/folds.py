"""Estimates which answers are wrong: adapters that were not trained on a row say how likely its answer is.

The confidence in an answer is the out-of-fold one of confident learning (Northcutt et al. 2021, arXiv:1911.00068). Of
an answer of several tokens it is that in its least likely one, and the rank of a row is how much likelier another token
is in its place.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from edgetune_export import architectures
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import UsageError

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.building import builders
from edgetune.building.trial import short_job, unsaved
from edgetune.common.progress import Progress
from edgetune.common.work_folder import locked, work_folder
from edgetune.objectives.base import row_length
from edgetune.planning.build import plan_bundle
from edgetune.planning.training import choose_training
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import Metric
from edgetune.recipe.targets import shapes_of
from edgetune.recipe.training import TrainingSpec
from edgetune.shipping.exported import PreparedAdapter
from edgetune.tasks.data import TaskRow
from edgetune.tasks.metrics import compared_answers
from edgetune.tasks.splitting import folds_of
from edgetune.tasks.task import Task
from edgetune.tasks.tokenization import tokenize_rows
from edgetune.training.duration import validation_tokens
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all

from .findings import JudgedRow, LabelEstimate
from .judging import judge
from .reading import Reader

FOLDS = 4
_TRAINING_SHARE = 0.75
"""Share of the time for training and validation; the rest is for asking the adapters."""
_OPTION = "--minutes (data.check_minutes)"
_PASSES = 2
"""Validation passes of a training, which has at least one per epoch."""


def estimate(task: Task, recipe: Recipe, minutes: float, progress: Progress) -> LabelEstimate:
    """Train adapters on parts of the rows, and judge each row by one that has not seen it, in about `minutes`.

    The time does not include that for the base, which stays in the work folder of the recipe's build if it was
    converted or quantized; nothing else is left. If it runs out, the longest rows are not judged. Raises
    UsageError for rows without answers, for too few, and for a task without estimates, and what a build raises.
    """
    recipe.task_type.check_offers("label_estimate", _OPTION)
    if task.metric == "perplexity":
        raise UsageError(f"the rows of {task.name!r} have no answers that could be wrong", f"leave out {_OPTION}")
    builder = builders.load(recipe.task)
    plan = plan_bundle(recipe, bases.find(recipe, download=True), shapes_of(recipe))
    work = work_folder(recipe.default_out)
    with locked(work):
        base: Base = builder.make_base(plan, work, progress, None)
    started, limit_s = time.monotonic(), minutes * 60

    def job_of(train: Sequence[TaskRow], validation: Sequence[TaskRow], options: TrainingSpec) -> PreparedAdapter:
        # Changed copies of the rows that are judged would tell their answers.
        part = replace(task, train=train, copies=(), validation=validation, choosing=validation)
        adapter = replace(plan.adapters[task.name], training=options, on_grid=False)
        planned = plan.with_adapters({**plan.adapters, task.name: adapter})
        return builder.jobs(planned, [part], base, Progress(quiet=True))[0]

    rows = [*task.train, *task.validation]
    whole = job_of(rows, rows[:1], choose_training(task.training, len(rows), plan.width, task.metric)[0])
    try:
        short = [row for row in rows if row.where not in whole.too_long]
        # Calls are judged whatever the metric, so their prompts are those of one fold.
        folds = folds_of(short, FOLDS, task.training.seed, "json" if any(row.tools for row in rows) else task.metric)
    except UsageError as error:
        message = f"{error.message} to tell which answers are wrong"
        raise UsageError(message, f"leave out {_OPTION}, or {error.remedy}") from error
    with unsaved() as folder:
        train = partial(train_all, base=base.name, load=partial(bases.load_torch, base), work=folder, plots=False)
        speed = train([short_job(whole.job)], progress=progress)[task.name].tokens_per_s
        trial_s = time.monotonic() - started
        options = _within(limit_s - trial_s, speed, whole.job)
        progress.say(
            f"{task.name}: {FOLDS} trainings of {options.epochs:.2g} epochs to estimate which answers are wrong"
        )
        jobs = []
        for number, fold in enumerate(folds, 1):
            others = [row for other in folds if other is not fold for row in other]
            jobs.append(replace(job_of(others, fold, options).job, name=f"{task.name}-{number}"))
        train(jobs, progress=progress)
        # Where the trainings took longer than planned, the rows are judged all the same.
        deadline = max(started + limit_s, time.monotonic() + (1 - _TRAINING_SHARE) * limit_s)
        asked = [_answers(fold, task.metric) for fold in folds]
        judged = list(_judged(asked, task.spec.system, jobs, base, folder, deadline=deadline, progress=progress))
    ranked = sorted(judged, key=lambda row: (row.relative, row.likelihood))
    unjudged = sum(len(same) for answers in asked for same in answers) - len(ranked)
    enough_s = trial_s + _epoch_seconds(speed, whole.job)
    needed_minutes = math.ceil(enough_s / 60) if options.epochs < min(1, whole.job.training.epochs) else None
    return LabelEstimate(ranked, unjudged, options.epochs, time.monotonic() - started, needed_minutes)


def _within(seconds: float, tokens_per_s: float, job: TrainingJob[Any]) -> TrainingSpec:
    """The options of each training, with as many epochs as the time allows, and at most those of the recipe."""
    tokens = max(seconds, 1) * _TRAINING_SHARE * tokens_per_s / FOLDS
    epoch, validation = _pass_tokens(job)
    # At most two passes, or one more than there are epochs.
    epochs = min((tokens - _PASSES * validation) / epoch, (tokens - validation) / (epoch + validation))
    # At least one step.
    epochs = max(epochs, 1 / len(job.train))
    # The last checkpoint knows more of the wrong answers by heart.
    shorter = {"epochs": min(job.training.epochs, epochs), "evals": _PASSES, "checkpoint": "best"}
    return job.training.model_copy(update=shorter)


def _epoch_seconds(tokens_per_s: float, job: TrainingJob[Any]) -> float:
    """The time in which each training reads its rows once, with that for asking the adapters."""
    epoch, validation = _pass_tokens(job)
    return FOLDS * (epoch + _PASSES * validation) / tokens_per_s / _TRAINING_SHARE


def _pass_tokens(job: TrainingJob[Any]) -> tuple[float, float]:
    """The tokens of an epoch of each training, and of a validation pass at their lower cost."""
    return sum(map(row_length, job.train)) * (FOLDS - 1) / FOLDS, validation_tokens(job.train) / FOLDS


def _answers(rows: Sequence[TaskRow], metric: Metric) -> list[list[TaskRow]]:
    """The answers of rows that the metric compares, or the last one, each with those that are the same.

    Where tools are offered, no texts are judged that say what a result means, whatever the metric.
    """
    same: dict[tuple[str, str | None], list[TaskRow]] = {}
    for row in rows:
        for answer in compared_answers(row, "json" if row.tools else metric) or [row]:
            same.setdefault((answer.prompt_key, answer.completion), []).append(answer)
    return [*same.values()]


def _judged(
    asked: Sequence[Sequence[Sequence[TaskRow]]],
    system: str | None,
    jobs: Sequence[TrainingJob[Any]],
    base: Base,
    folder: Path,
    *,
    deadline: float,
    progress: Progress,
) -> Iterator[JudgedRow]:
    """The answers of each fold, judged by the adapter that was validated on it; each has the same part of the time.

    Of those that are the same, one is asked for.
    """
    model = bases.load_torch(base, torch.float32)
    # A recurrent state cannot be cut back to the beginning that rows have in common.
    takes_cache = not architectures.of(base.header).is_recurrent
    total = sum(map(len, asked))
    with closing(GgufTokenizer(base.path)) as tokenizer, progress.step("asking the adapters", total) as step:
        for number, (answers, job) in enumerate(zip(asked, jobs, strict=True)):
            rows = [same[0] for same in answers]
            now = time.monotonic()
            until = now + (deadline - now) / (len(asked) - number)
            examples, _ = tokenize_rows(rows, tokenizer, system=system, loss_on="completion", max_tokens=sys.maxsize)
            checkpoint = methods.Checkpoint(job.name, folder / job.name / "adapter", model, job.options)
            with job.method.loaded(checkpoint) as tuned:
                reader = Reader(tuned, examples, takes_cache=takes_cache and job.method.takes_cache)
                judged = {row.where: row for row in judge(reader, tokenizer, rows, examples, step, deadline=until)}
            for first, *others in answers:
                if first.where in judged:
                    yield from (replace(judged[first.where], where=answer.where) for answer in (first, *others))
