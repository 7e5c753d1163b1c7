"""Plans which merged models keep the base's types, because they are trained through the rounding to its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune_export import backends
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import TensorType, gains_from_grid

from edgetune.recipe.model import Recipe

from .records import AdapterPlan, BasePlan


def with_grid(
    recipe: Recipe, adapters: Mapping[str, AdapterPlan], base: BasePlan, main_type: TensorType
) -> dict[str, AdapterPlan]:
    """The adapters with `on_grid` for a base of this main type, and the sizes of their models, which are the base's.

    UsageError for one that is to be trained in int8.
    """
    planned = dict(adapters)
    for name, adapter in adapters.items():
        if not (adapter.takes_grid and gains_from_grid(main_type, recipe.merged_quantization)):
            continue
        if recipe.training.under(adapter.spec.training).precision == "int8":
            message = f"adapters.{name} is trained with weights rounded to {main_type.name}, and not in int8"
            raise UsageError(message, "set training.precision: auto, or merged_quantization: q8_0")
        sizes = {
            target: int(
                backends.format_of(target).base_bytes(
                    base.bytes_in(target), base.parameters or 0, recipe.format_options
                )
            )
            for target in adapter.bytes_by_format
        }
        planned[name] = replace(adapter, on_grid=True, bytes_by_format=sizes)
    return planned
