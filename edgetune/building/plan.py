"""Plans the build of a recipe: reads its base's header and its data once, and reports all problems together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.bundle import ASK, BASE, DEFER, ERROR, MARK
from edgetune_runtime.errors import EdgetuneError, UsageError, naming
from edgetune_runtime.wording import suggestion

from edgetune import bases, methods
from edgetune.bases import BaseSource
from edgetune.building.outputs.resolve import output_of_task
from edgetune.building.routing.prompts import prompts_of
from edgetune.common.work_folder import work_folder
from edgetune.planning.build import plan_bundle, plan_data
from edgetune.planning.needs import room_for
from edgetune.planning.records import PlannedBuild
from edgetune.recipe.model import Recipe, gains_from_matrix
from edgetune.recipe.parts import AdapterSpec
from edgetune.recipe.targets import shapes_of
from edgetune.tasks.folds import fold_tasks
from edgetune.tasks.task import Task, Texts, read_task, read_texts
from edgetune.training.device import CPU, TrainingDevice, may_have_gpu
from edgetune.training.precision import check_precision

_TEMPLATE_MARK = re.compile(r"<[^<>\s]+>|\[/INST\]")
"""A mark as chat templates write them: a text with one may be a rendered conversation."""


def plan_build(
    recipe: Recipe,
    out: Path | None = None,
    others: Mapping[str, AdapterSpec] | None = None,
    in_bundle: Collection[str] = (),
) -> PlannedBuild:
    """Read the header of the recipe's base and all rows of its data, and plan the build of the bundle `out`.

    `out` is by default `recipe.default_out`; `others` are adapters that are in it already, and `in_bundle` the names of
    all that are, also of those without a recipe. A base that must be downloaded first is planned as far as it is known
    without it. Raises one error for all problems, with the exit code of the first.
    """
    problems: list[EdgetuneError] = []
    whole = recipe.model_copy(update={"adapters": {**(others or {}), **recipe.adapters}})
    source: BaseSource | None = None
    texts: Texts | None = None
    with _collected(problems):
        source = bases.find(recipe)
    with _collected(problems):
        shapes = shapes_of(whole)
    with _collected(problems):
        if not problems:
            plan = plan_bundle(whole, source, shapes)
    device = CPU
    with _collected(problems):
        device = _device(recipe.training.device)
        check_precision(recipe, device)
    with _collected(problems):
        texts = read_texts(recipe)
    trained = [work_folder(out or recipe.default_out) / "train" / name for name in recipe.adapters]
    tasks, outputs = [], {}
    for name, spec in recipe.adapters.items():
        with _collected(problems):
            _check_files(name, spec, trained)
        with _collected(problems):
            _check_unsure(name, spec, {*whole.others(name), *in_bundle} - {name})
        with _collected(problems):
            task = read_task(name, recipe)
            _check_labels(task)
            _check_texts(task)
            tasks.append(replace(task, folds=fold_tasks(task, recipe)))
            outputs[name] = output_of_task(tasks[-1])
            if recipe.route is not None and name in (recipe.route.adapters or recipe.adapters):
                prompts_of(tasks[-1])
    if problems:
        raise problems[0] if len(problems) == 1 else type(problems[0])("\n".join(map(str, problems)))
    room = room_for(out or recipe.default_out, device)
    return PlannedBuild(plan_data(plan, tasks, outputs, texts, room), tasks, texts)


def _check_files(name: str, spec: AdapterSpec, trained: Sequence[Path]) -> None:
    """Raise if a file that the method reads is missing, or if training cannot start from the adapter that it names.

    `trained` are the folders in which the build trains.
    """
    method, options = methods.load(spec.method.name), spec.method.options
    with naming(f"adapter {name!r}"):
        method.check_files(options)
        if spec.start_from is not None:
            start = Path(spec.start_from)
            if any(start.resolve().is_relative_to(folder.resolve()) for folder in trained):
                message = f"start_from is {start}, which this build replaces"
                raise UsageError(message, "build in another folder, or start from a copy of that one")
            method.check_start(start, options)


def _check_unsure(name: str, spec: AdapterSpec, others: Iterable[str]) -> None:
    """UsageError if an adapter that is to answer in place of unsure answers is not among `others`."""
    answers = (MARK, ASK, BASE, ERROR, DEFER, *sorted(others))
    if spec.unsure not in answers:
        raise UsageError(f"adapter {name!r}: unsure is {spec.unsure!r}", suggestion(spec.unsure, answers))


def _check_labels(task: Task) -> None:
    """UsageError for labels of which there is no other to choose."""
    if task.metric == "label" and len(task.labels) < 2:
        message = f"adapter {task.name!r}: all rows have the label {task.labels[0]!r}"
        raise UsageError(message, "add rows of another label, or set out_of_scope, which adds one")


def _check_texts(task: Task) -> None:
    """UsageError for rows of plain text that the method cannot learn from; those with marks are seen in training."""
    method, rows = task.spec.method, (*task.trained_rows, *task.choosing)
    texts = [row.where for row in rows if row.messages is None and not _TEMPLATE_MARK.search(row.text or "")]
    with naming(f"adapter {task.name!r}"):
        methods.load(method.name).check_texts(method.options, texts)


def with_download(planned: PlannedBuild, out: Path) -> PlannedBuild:
    """The plan with the base, which is downloaded if necessary."""
    recipe = planned.plan.recipe
    return _planned_again(planned, recipe, bases.find(recipe, download=True), out)


def with_quantization(planned: PlannedBuild, quantization: str | None, out: Path) -> PlannedBuild:
    """The plan with the quantization that was chosen for the base; None if its file ships unchanged."""
    recipe = planned.plan.recipe
    imatrix = recipe.imatrix if gains_from_matrix(quantization) else None
    recipe = recipe.model_copy(update={"quantization": quantization, "imatrix": imatrix})
    return _planned_again(planned, recipe, planned.plan.source, out)


def _planned_again(planned: PlannedBuild, recipe: Recipe, source: BaseSource | None, out: Path) -> PlannedBuild:
    adapters = planned.plan.adapters
    shapes = {name: adapter.shapes for name, adapter in adapters.items()}
    outputs = {name: adapter.output for name, adapter in adapters.items()}
    plan = plan_bundle(recipe, source, shapes)
    room = room_for(out, planned.plan.training_device)
    return replace(planned, plan=plan_data(plan, planned.tasks, outputs, planned.texts, room))


@contextmanager
def _collected(problems: list[EdgetuneError]) -> Iterator[None]:
    """Add what is raised to the problems, and go on."""
    try:
        yield
    except EdgetuneError as error:
        problems.append(error)


def _device(key: str) -> TrainingDevice:
    """The device of `key`, a value of `training.device`; torch is asked only where there may be a GPU."""
    if key == "cpu" or (key == "auto" and not may_have_gpu()):
        return CPU
    from edgetune.training.hardware import use_device  # noqa: PLC0415 - torch, which nothing else here needs

    return use_device(key)
