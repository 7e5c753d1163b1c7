"""Scores a bundle's adapters for its report, with some right and some wrong answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of, shortened

from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks.evaluation import Evaluation, ScoredRow, evaluate, score
from edgetune.tasks.task import Task, read_task

from .facts import Answer, Score

SHOWN_ANSWERS = 3
"""Right answers per adapter, and wrong ones."""


def score_adapters(
    bundle: Path, manifest: Manifest, recipe: Path | None, files: Mapping[str, str], *, limit: int, progress: Progress
) -> dict[str, Score]:
    """Score the adapters in `files` on at most `limit` rows of these, and the others of `recipe` on their validation
    rows.

    UsageError for a recipe of other adapters, if there are no `files`.
    """
    tasks = []
    if recipe is not None:
        adapters = Recipe.from_file(recipe).adapters
        if not files and not adapters.keys() & manifest.adapters.keys():
            message = f"{recipe} has none of the adapters {first_of([*manifest.adapters], separator=', ')}"
            raise UsageError(message, "give the recipe that trained them")
        names = [name for name in adapters if name in manifest.adapters and name not in files]
        loaded = Recipe.from_file(recipe, split_of(manifest, names))
        tasks = [read_task(name, loaded) for name in names]
    scores = {}
    if tasks:
        with Runtime.open(bundle, disk_mb=0) as runtime:
            for task in tasks:
                rows = task.validation_answers
                if not rows:
                    progress.say(f"{task.name}: no validation row can be scored by {task.metric}")
                    continue
                evaluation = score(runtime, task.name, rows, progress, limit=limit)
                is_chosen = _training_of(manifest, task.name).get("checkpoint") != "last"
                source = f"its validation data{', which also chose the checkpoint' if is_chosen else ''}"
                if doubt := split_doubt(manifest, task):
                    progress.say(f"warning: {task.name}: {doubt}: build again, or give test rows with --data")
                    source += f"; {doubt}"
                scores[task.name] = _score(evaluation, source)
    for name, file in files.items():
        scores[name] = _score(evaluate(bundle, name, file, limit=limit, progress=progress), Path(file).name)
    return scores


def split_of(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """The settings of the build that decide which rows it held out, as overrides of its recipe.

    There are none for adapters that were not built from a recipe.
    """
    recipe = manifest.recipe
    settings = {}
    for name in filter(recipe.get("adapters", {}).__contains__, names):
        settings[f"adapters.{name}.training.seed"] = _training_of(manifest, name)["seed"]
        settings[f"adapters.{name}.data.held_out"] = recipe["adapters"][name]["data"]["held_out"]
    return settings


def split_doubt(manifest: Manifest, task: Task) -> str | None:
    """That the validation rows of the task may be training rows of the bundle's adapter, if their numbers say so."""
    recipe, plan = (part.get("adapters", {}).get(task.name, {}) for part in (manifest.recipe, manifest.plan))
    rows = plan.get("rows")
    # What has learned corrections has a split of its own.
    if not (recipe and rows) or {task.spec.data.validation, recipe["data"].get("validation")} != {None}:
        return None
    if (rows["train"], rows["validation"]) == (len(task.trained_rows), len(task.validation)):
        return None
    return "the rows or data options changed since the build, so some validation rows may have been trained on"


def _training_of(manifest: Manifest, name: str) -> dict[str, Any]:
    """The training options with which the adapter was built; none for one that was not built from a recipe."""
    adapter = manifest.recipe.get("adapters", {}).get(name)
    return {} if adapter is None else {**manifest.recipe["training"], **adapter["training"]}


def _score(evaluation: Evaluation, source: str) -> Score:
    """What the report shows of an evaluation; a perplexity has no answers."""
    score = Score(evaluation.metric, evaluation.score, evaluation.rows, source)
    if evaluation.metric == "perplexity":
        return score
    rows = sorted(evaluation.details, key=lambda row: -row.score)
    count = math.ceil(len(rows) / 2) if score.is_graded else sum(row.score >= 1 for row in rows)
    best, worst = rows[:count], [row for row in reversed(rows[count:]) if row.score < 1]
    return replace(score, points=[row.score for row in rows], best=_shown(best), worst=_shown(worst))


def _shown(rows: Sequence[ScoredRow]) -> list[Answer]:
    """The first answers to different prompts, or that should have been others."""
    first: dict[tuple[str, str], ScoredRow] = {}
    for row in rows:
        # After tools, prompts end with results, which are often the same.
        first.setdefault((row.prompt, row.reference), row)
    shown = [*first.values()][:SHOWN_ANSWERS]
    return [Answer(shortened(row.prompt), shortened(row.answer), shortened(row.reference)) for row in shown]
