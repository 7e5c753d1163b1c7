"""Plans a build from its recipe, the base's header and the rows of its data, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgetune_export.adapters.shapes import Merged
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError, naming

from edgetune import methods
from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import Task, Texts
from edgetune.tasks.tokenization import longest_tokens

from .adapters import check_method, plan_adapters
from .board import choose_settings
from .needs import plan_rows, report
from .records import AdapterPlan, BuildPlan, Room
from .training import choose_training


def plan_bundle(recipe: Recipe, source: BaseSource | None, shapes: Mapping[str, Mapping[str, str]]) -> BuildPlan:
    """The plan without the data: the base, the settings that recipe and board choose, the adapters and their sizes.

    `shapes` are those of each adapter by format. `source` None: the base must be downloaded first, and all that depends
    on its header is missing. Raises UsageError or IncompatibleError for a context, or options of a method,
    that the base does not support, and IncompatibleError if the bundle cannot fit on the recipe's board.
    """
    if source is not None:
        _check_lengths(recipe, source.trained_context_length)
        _check_domain(recipe, source)
    plan = choose_settings(recipe, plan_adapters(recipe, shapes, source), source)
    _check_prefixes(plan)
    return plan


def plan_data(
    plan: BuildPlan,
    tasks: Sequence[Task],
    outputs: Mapping[str, OutputSpec | None],
    texts: Texts | None,
    room: Room,
) -> BuildPlan:
    """The plan with what the rows decide, and what the build needs of the `room` of this machine.

    `outputs` are the output constraints of the tasks, `texts` those of continued pretraining. Raises the errors of
    `needs.check`.
    """
    adapters = {task.name: _with_data(plan, task, outputs[task.name]) for task in tasks}
    plan = replace(
        plan.with_adapters(adapters), domain=None if texts is None else str(texts), training_device=room.device
    )
    base = None if plan.source is None else plan.source.shape
    return plan if base is None else replace(plan, needs=report(plan, base, room))


def _with_data(plan: BuildPlan, task: Task, output: OutputSpec | None) -> AdapterPlan:
    adapter, length = plan.adapters[task.name], plan.recipe.context_length
    training, reason = choose_training(task.training, len(task.trained_rows), plan.width, task.metric)
    changes = {"training": training} if reason else {}
    added = plan.recipe.task_type.added_tokens
    rows, doubts = plan_rows(task, training, added), list(task.doubts)
    file = None if plan.source is None else plan.source.file
    # The estimate of the plan is a high one.
    if (
        rows.longest_tokens > length
        and (longest := longest_tokens(task.trained_rows, task.spec.system, file, added)) > length
    ):
        about = "about " if file is None else ""
        message = f"rows have up to {about}{longest} tokens, and those of more than {length} are left out"
        doubts.append(f"{message}; see them with `edgetune data check`, or set a larger context_length")
    return replace(
        adapter,
        spec=adapter.spec.model_copy(update=changes),
        metric=task.metric,
        labels=task.labels,
        output=output,
        training=training,
        training_reason=reason,
        rows=rows,
        doubts=tuple(doubts),
    )


def _check_domain(recipe: Recipe, source: BaseSource) -> None:
    """UsageError or IncompatibleError if the method of the recipe's domain, whose result is merged, does not fit."""
    if recipe.domain is None:
        return
    with naming("domain.method"):
        check_method(recipe.domain.method, dict.fromkeys(recipe.targets, Merged.shape), source)


def _check_prefixes(plan: BuildPlan) -> None:
    """UsageError for an adapter that fills the context, so that no row fits after it."""
    length = plan.recipe.context_length
    for name, adapter in plan.adapters.items():
        tokens = methods.load(adapter.method).prefix_tokens(adapter.options)
        if tokens >= length:
            message = f"adapter {name!r}: num_virtual_tokens is {tokens}, but the context has {length} tokens"
            raise UsageError(message, f"give fewer than {length}")


def _check_lengths(recipe: Recipe, trained: int) -> None:
    """UsageError if the recipe sets a context or a window above `trained`, the tokens that its base was trained for."""
    if recipe.context_length > trained and "context_length" in recipe.model_fields_set:
        message = f"context_length is {recipe.context_length}, but {recipe.base!r} supports at most {trained} tokens"
        raise UsageError(message, f"set it to at most {trained}")
    if recipe.domain is not None and recipe.domain.window is not None and recipe.domain.window > trained:
        message = f"domain.window is {recipe.domain.window}, but {recipe.base!r} was trained for {trained} tokens"
        raise UsageError(message, f"set it to at most {trained}")
