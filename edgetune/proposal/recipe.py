"""Makes a recipe for data files: one task per file, and a context that fits the rows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import printable

from edgetune import bases
from edgetune.common.command_line import command_line
from edgetune.recipe.data import Columns
from edgetune.recipe.model import Recipe
from edgetune.tasks.data import TaskRow, rows_of, with_weight
from edgetune.tasks.metrics import metric_for
from edgetune.tasks.splitting import split
from edgetune.tasks.tokenization import longest_tokens

from .choices import Choice, nested_values, text_of
from .columns import form_of
from .files import Sample, TaskFiles, read_sample, slug, tasks_of
from .settings import settings_of

DEFAULT_BASE = "smollm2-135m"
_REASONS = {
    DEFAULT_BASE: "135 million parameters in 98 MB, for any board; a larger base gives better answers, but more slowly"
}
_USEFUL_ROWS = 100
_CONTEXT_STEP, _LEAST_CONTEXT = 128, 256
"""Context lengths are multiples of the step."""
_ROOM = 1.25
"""Context per token of the longest row, for longer prompts and answers than those in the rows."""


@dataclass(frozen=True)
class ProposedRecipe:
    """A recipe for data files, and its YAML text with the reason for each setting."""

    recipe: Recipe
    text: str


@dataclass(frozen=True)
class _ProposedTask:
    """A task's files, its first rows, and the choices for its adapter."""

    files: TaskFiles
    rows: Sequence[TaskRow]
    choices: Sequence[Choice]


def default_name(files: Sequence[Path | str]) -> str:
    """The name of a recipe for these files: that of the only task, or of the current folder."""
    tasks = tasks_of([Path(file) for file in files])
    return tasks[0].name if len(tasks) == 1 else slug(Path.cwd().name)


def recipe_for(
    files: Sequence[Path | str],
    *,
    base: str = DEFAULT_BASE,
    path: Path = Path("recipe.yaml"),
    name: str | None = None,
) -> ProposedRecipe:
    """A recipe with one task per file, to be written to `path`; its paths are relative to that file's folder.

    The folder must exist. At most 8 MB of each file are read. Raises UsageError or NotFoundError for files that cannot
    be used, and what `bases.find` does for the base.
    """
    folder = path.parent
    tasks = [_task(task_files, folder) for task_files in tasks_of([Path(file) for file in files])]
    written = written_base(base, folder)
    is_encoder = bases.is_encoder(written, folder)
    if is_encoder:
        tasks = [_of_encoder(task, base) for task in tasks]
    choices = [
        Choice("name", name or default_name(files)),
        *([Choice("task", CLASSIFICATION, "the base is an encoder, which only chooses labels")] if is_encoder else []),
        Choice("base", written, _REASONS.get(base, "")),
        *(choice for task in tasks for choice in task.choices),
    ]
    draft = Recipe.model_validate(nested_values(choices), context={"folder": folder})
    choices.insert(2 + is_encoder, _context_length(draft, tasks))
    recipe = Recipe.model_validate(nested_values(choices), context={"folder": folder})
    return ProposedRecipe(recipe, text_of(choices, _introduction(recipe, tasks, path)))


def _task(files: TaskFiles, folder: Path) -> _ProposedTask:
    sample = read_sample(files.train)
    if not sample.values:
        rows_of(str(files.train), sample.entries)  # raises an error that names the lines
    form = form_of(files.train, sample.values)
    columns = None if form.columns is None else Columns.model_validate(form.columns)
    rows = with_weight(rows_of(str(files.train), sample.entries, columns))
    choices = [Choice("data.train", _as_written(files.train, folder), _about_file(files, sample))]
    if files.validation is not None:
        choices.append(Choice("data.validation", _as_written(files.validation, folder)))
    else:
        split(rows, 0.5, 0, metric_for("auto", rows, None))  # raises an error if all rows have the same prompt
    if form.columns is not None:
        choices.append(Choice("data.columns", form.columns, form.reason))
    choices += settings_of(files.name, sample, form, rows, held_out=files.validation is None)
    if files.validation is not None:
        labels = next((choice.value for choice in choices if choice.key == "labels"), None)
        labels = labels if isinstance(labels, list) else None
        rows_of(str(files.validation), read_sample(files.validation).entries, columns, labels=labels)
    return _ProposedTask(files, rows, [choice.under(f"adapters.{files.name}") for choice in choices])


def _of_encoder(task: _ProposedTask, base: str) -> _ProposedTask:
    """The task without a system prompt, which encoders do not have; UsageError if its answers are not labels."""
    name = task.files.name
    if not any(choice.value == "label" for choice in task.choices if choice.key == f"adapters.{name}.metric"):
        message = f"base {base!r} is an encoder, which only chooses labels, and the answers of {name} are other texts"
        raise UsageError(message, "choose another --base")
    choices = [choice for choice in task.choices if choice.key != f"adapters.{name}.system"]
    return replace(task, choices=choices)


def _about_file(files: TaskFiles, sample: Sample) -> str:
    few = "; a useful task needs a few hundred" if sample.rows < _USEFUL_ROWS else ""
    score = f"; {files.test.name} is for `edgetune evaluate`" if files.test is not None else ""
    return f"{sample}{few}{score}"


def _context_length(draft: Recipe, tasks: Sequence[_ProposedTask]) -> Choice:
    """The context that the longest row needs, with some room, within what the base was trained for."""
    base = bases.find(draft)
    file = None if base is None else base.file
    added = draft.task_type.added_tokens
    longest = [longest_tokens(task.rows, draft.adapters[task.files.name].system, file, added) for task in tasks]
    tokens = max(longest)
    name = tasks[longest.index(tokens)].files.name
    about = "about " if file is None else ""
    length = max(math.ceil(tokens * _ROOM / _CONTEXT_STEP) * _CONTEXT_STEP, _LEAST_CONTEXT)
    reason = f"tokens of prompt and answer together: the longest row of {name} has {about}{tokens:,}"
    if base is not None and length > (most := base.trained_context_length):
        reason += f"; the base supports {most:,}" + (", and rows with more are left out" if tokens > most else "")
        length = most
    return Choice("context_length", length, reason)


def _introduction(recipe: Recipe, tasks: Sequence[_ProposedTask], path: Path) -> str:
    names = ", ".join(task.files.train.name for task in tasks)
    lines = [
        f"Made by edgetune from {names}, with the reason for each setting.",
        "Change what you like, then:",
        f"  {command_line('edgetune', 'plan', path)}",
        f"  {command_line('edgetune', 'build', path, '--out', Path('build', recipe.name))}",
    ]
    if recipe.task_type.has_encoders:
        return "\n".join(map(printable, [*lines, "All keys are in docs/recipe.md; see also docs/encoders.md."]))
    lines.append("All keys are in docs/recipe.md; `device: pi-4` checks that the bundle fits on a board.")
    if all(spec.metric == "label" for spec in recipe.adapters.values()):
        lines.append("All tasks choose a label, which a small encoder does faster: docs/encoders.md.")
    return "\n".join(map(printable, lines))


def written_base(base: str, folder: Path) -> str:
    """A base as the recipe in `folder` names it."""
    is_path = base not in bases.ALIASES and Path(base).exists()
    return _as_written(Path(base), folder) if is_path else base


def _as_written(path: Path, folder: Path) -> str:
    """A path as the recipe in `folder` names it: relative to it, or as given if it is absolute and elsewhere."""
    is_elsewhere = path.is_absolute() and not path.resolve().is_relative_to(folder.resolve())
    return str(path) if is_elsewhere else os.path.relpath(path.resolve(), folder.resolve())
