"""Predicts what the bundle of a recipe needs on a device, before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune_devices import boards, fit
from edgetune_devices.needs import engine_of, needs_of_header
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import quantization_of_merged

from edgetune.recipe.model import Recipe

from .records import AdapterPlan, BuildPlan

Adapters = Mapping[str, AdapterPlan]


def bundle_needs(
    recipe: Recipe,
    adapters: Adapters,
    header: GgufHeader,
    quantization: str | None,
    engine: str | None = None,
    *,
    context_length: int | None = None,
) -> Needs:
    """What the bundle will need in `engine`, by default that of its first target, and with the recipe's context length.

    `quantization` None: the file with this header ships unchanged.
    """
    engine, context_length = engine or engine_of(recipe.targets[0]), context_length or recipe.context_length

    def base_in(quantization: str | None) -> Needs:
        return needs_of_header(header, context_length=context_length, quantization=quantization, engine=engine)

    base = base_in(quantization)
    memory, merged = {}, {}
    for name, adapter in adapters.items():
        if engine in adapter.memory:
            memory[name] = adapter.memory[engine]
        else:
            requested, on_grid = recipe.merged_quantization, adapter.takes_grid
            other = quantization_of_merged(base.layer_types, requested, trains_on_grid=on_grid)
            merged[name] = base_in(other or quantization).base_bytes
    return replace(base, adapters=memory, merged=merged)


def base_bytes(header: GgufHeader, target: str) -> int:
    """The size in a format of a base whose GGUF file has this header, as `BasePlan.bytes_in`."""
    return needs_of_header(header, context_length=1, engine=engine_of(target)).base_bytes


def check_fit(plan: BuildPlan, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if plan.recipe.device is not None:
        needs = bundle_needs(plan.recipe, plan.adapters, header, None)
        fit.require_fit(needs, boards.load(plan.recipe.device))
