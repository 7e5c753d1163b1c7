"""Predicts what the bundle of a recipe needs on a device, before it is built."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_devices import boards, fit
from edgetune_devices.needs import needs_of_header
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import AdapterSize, Needs
from edgetune_runtime.formats.gguf_file import GgufHeader

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
    engine = engine or _engine(recipe)
    sizes, merged = _sizes(adapters, engine)
    return needs_of_header(
        header,
        context_length=context_length or recipe.context_length,
        quantization=quantization,
        adapters=sizes,
        merged=merged,
        merged_quantization=recipe.merged_quantization,
        engine=engine,
    )


def base_bytes(header: GgufHeader, target: str) -> int:
    """The size in a format of a base whose GGUF file has this header, as `BasePlan.bytes_in`."""
    engine = target if target in engines.names_with_needs() else gguf.NAME
    return needs_of_header(header, context_length=1, engine=engine).base_bytes


def check_fit(plan: BuildPlan, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if plan.recipe.device is not None:
        needs = bundle_needs(plan.recipe, plan.adapters, header, None)
        fit.require_fit(needs, boards.load(plan.recipe.device))


def _engine(recipe: Recipe) -> str:
    """The engine that opens the bundle by default; for one of an unknown format, sizes are those of GGUF."""
    return recipe.targets[0] if recipe.targets[0] in engines.names_with_needs() else gguf.NAME


def _sizes(adapters: Adapters, engine: str) -> tuple[dict[str, AdapterSize], dict[str, bool]]:
    """The memory of the adapters in an engine; of its merged models, whether they can be trained on the base's grid."""
    sizes = {name: adapter.memory[engine] for name, adapter in adapters.items() if engine in adapter.memory}
    return sizes, {name: adapter.takes_grid for name, adapter in adapters.items() if name not in sizes}
