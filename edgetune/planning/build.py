"""Plans a build from its recipe, the base's header and the rows of its data; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgetune_devices import fit
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.engines import gguf
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import FLOATS

from edgetune.bases import BaseSource, quantization_of
from edgetune.recipe.model import Recipe
from edgetune.tasks import Task, Texts

from .adapters import plan_adapter
from .board import bundle_needs, choose_for, engines_of, plan_board
from .needs import plan_rows, report
from .records import BasePlan, BuildPlan, Room

Shapes = Mapping[str, Mapping[str, str]]
"""The shape of each adapter in each format."""


def plan_bundle(recipe: Recipe, source: BaseSource | None, shapes: Shapes) -> BuildPlan:
    """The plan without the data: the base, the settings that recipe and board choose, the adapters and their sizes.

    `source` None: the base must be downloaded first, and all that depends on its header is missing. Raises UsageError
    for a context that the base does not support, IncompatibleError if the bundle cannot fit on the recipe's board.
    """
    header = None if source is None else source.header
    if source is not None:
        _check_lengths(recipe, source.trained_context_length)
    adapters = {
        name: plan_adapter(name, spec, shapes[name], header, recipe.onnx.weights)
        for name, spec in recipe.adapters.items()
    }
    choice = None if header is None else choose_for(recipe, adapters, header)
    quantization = quantization_of(recipe) if choice is None else choice.quantization
    recipe = _with_choices(recipe, source, choice)
    if source is None or header is None:
        return BuildPlan(recipe, source, _plan_base(recipe, source, quantization), adapters)
    needs = {engine: bundle_needs(recipe, adapters, header, quantization, engine) for engine in engines_of(recipe)}
    base = replace(_plan_base(recipe, source, quantization), gguf_bytes=needs[gguf.NAME].base_bytes)
    return BuildPlan(recipe, source, base, adapters, None if choice is None else plan_board(recipe, choice, needs))


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
    adapters = {
        task.name: replace(
            plan.adapters[task.name],
            metric=task.metric,
            labels=task.labels,
            output=outputs[task.name],
            rows=plan_rows(task),
        )
        for task in tasks
    }
    plan = replace(plan, adapters=adapters, domain=None if texts is None else str(texts))
    header = None if plan.source is None else plan.source.header
    return plan if header is None else replace(plan, needs=report(plan, header, room))


def _check_lengths(recipe: Recipe, trained: int) -> None:
    """UsageError if the recipe sets a context or a window above `trained`, the tokens that its base was trained for."""
    if recipe.context_length > trained and "context_length" in recipe.model_fields_set:
        message = f"context_length is {recipe.context_length}, but {recipe.base!r} supports at most {trained} tokens"
        raise UsageError(message, f"set it to at most {trained}")
    if recipe.domain is not None and recipe.domain.window is not None and recipe.domain.window > trained:
        message = f"domain.window is {recipe.domain.window}, but {recipe.base!r} was trained for {trained} tokens"
        raise UsageError(message, f"set it to at most {trained}")


def _with_choices(recipe: Recipe, source: BaseSource | None, choice: fit.BoardChoice | None) -> Recipe:
    """The recipe with the choices for its board, and a context that its base supports."""
    if source is None:
        return recipe
    chosen: dict[str, Any] = {}
    if choice is not None:
        chosen = {"quantization": choice.quantization, "threads": choice.threads}
    length = recipe.context_length if choice is None else choice.context_length
    # The default may be more than the base supports.
    chosen["context_length"] = min(length, source.trained_context_length)
    return recipe.model_copy(update=chosen)


def _plan_base(recipe: Recipe, source: BaseSource | None, quantization: str | None) -> BasePlan:
    steps = _steps(source, quantization) + (["continue pretraining"] if recipe.domain is not None else [])
    if source is None:
        return BasePlan(recipe.base, quantization, tuple(steps))
    return BasePlan(
        source.name,
        quantization,
        tuple(steps),
        source.architecture,
        source.trained_context_length,
        None if source.header is None else source.header.parameters,
    )


def _steps(source: BaseSource | None, quantization: str | None) -> list[str]:
    """What the build does with the base before training."""
    steps = [] if source is not None else ["download"]
    if quantization is None:
        return steps
    if source is not None and not source.is_folder:
        return [*steps, f"requantize to {quantization}"]
    if quantization in FLOATS:
        return [*steps, f"convert to GGUF {quantization}"]
    return [*steps, "convert to GGUF", f"quantize to {quantization}"]
