"""Predicts what the bundle of a recipe needs on a device, before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune_devices import boards, fit
from edgetune_devices.needs import engine_of, needs_of_header
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import TENSOR_TYPES, gains_from_grid, quantization_of_merged

from edgetune import methods
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
            merged[name] = base_in(quantization_in(recipe, adapter, header, quantization)).base_bytes
    return replace(base, adapters=memory, merged=merged)


def quantization_in(recipe: Recipe, adapter: AdapterPlan, header: GgufHeader, quantization: str | None) -> str | None:
    """The quantization of an adapter's merged model, for a base as in `bundle_needs`."""
    requested, types = _requested(recipe, adapter, header, quantization)
    return quantization_of_merged(types, requested, trains_on_grid=adapter.takes_grid) or quantization


def grid_types(recipe: Recipe, adapter: AdapterPlan, header: GgufHeader, quantization: str | None) -> tuple[str, ...]:
    """The types of the base's layers if the adapter is to be trained through the rounding to their grid, else none."""
    requested, types = _requested(recipe, adapter, header, quantization)
    return types if adapter.takes_grid and gains_from_grid(types, requested) else ()


def domain_grid_types(recipe: Recipe, header: GgufHeader, quantization: str | None = None) -> tuple[str, ...]:
    """The types of the base's layers if the domain is to be trained through the rounding to their grid, else none."""
    if recipe.domain is None or not methods.load(recipe.domain.method.name).trains_on_grid:
        return ()
    types = needs_of_header(header, context_length=1, quantization=quantization).layer_types
    return types if gains_from_grid(types) else ()


def _requested(
    recipe: Recipe, adapter: AdapterPlan, header: GgufHeader, quantization: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """The quantization that is requested for the merged model, and the types of the base's layers.

    None if it has the types of the base and the adapter can be trained on their grid.
    """

    def needs_in(quantization: str | None) -> Needs:
        return needs_of_header(header, context_length=1, quantization=quantization)

    requested, base = recipe.merged_quantization, needs_in(quantization)
    if adapter.takes_grid and requested is not None and _quantized(needs_in(requested)) == _quantized(base):
        requested = None
    return requested, base.layer_types


def _quantized(needs: Needs) -> tuple[set[str], str]:
    """The quantized types of the layers, and the type of the output layer; which floats llama.cpp leaves varies."""
    return {name for name in needs.layer_types if not TENSOR_TYPES[name].is_float}, needs.head_type


def base_bytes(header: GgufHeader, target: str) -> int:
    """The size in a format of a base whose GGUF file has this header, as `BasePlan.bytes_in`."""
    return needs_of_header(header, context_length=1, engine=engine_of(target)).base_bytes


def check_fit(plan: BuildPlan, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if plan.recipe.device is not None:
        needs = bundle_needs(plan.recipe, plan.adapters, header, None)
        fit.require_fit(needs, boards.load(plan.recipe.device))
