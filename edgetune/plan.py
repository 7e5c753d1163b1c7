"""Recipe and its base's header in; what the bundle will need on a board, and what the board chooses, out. No torch."""

from __future__ import annotations

from edgetune_devices import boards, fit
from edgetune_runtime.gguf_file import GgufHeader

from .methods._peft import ALL_LINEAR
from .methods.lora import AUTO
from .recipe import AdapterSpec, Recipe


def needs_of_recipe(recipe: Recipe, header: GgufHeader, *, requantize: bool) -> fit.Needs:
    """What the bundle of `recipe` will take; `requantize`: the build quantizes the base as the recipe says."""
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        scheme=recipe.quantize if requantize else None,
        adapters=_adapter_sizes(recipe, header),
        merged=_merged(recipe),
    )


def choose_for(recipe: Recipe, header: GgufHeader, *, requantize: bool) -> fit.Choice | None:
    """What the recipe's board picks for the keys that the recipe leaves unset; None when it names no board.

    What the recipe sets is kept. Raises IncompatibleError when the bundle cannot fit, so a build ends before training.
    """
    if recipe.device is None:
        return None
    written = recipe.model_fields_set
    return fit.choose(
        boards.load(recipe.device),
        header,
        adapters=_adapter_sizes(recipe, header),
        merged=_merged(recipe),
        quantize=recipe.quantize if requantize else None,
        context_length=recipe.context_length if "context_length" in written else None,
        threads=recipe.threads,
        requantize=requantize,
    )


def _adapter_sizes(recipe: Recipe, header: GgufHeader) -> dict[str, fit.AdapterSize]:
    return {name: _adapter_size(spec, header) for name, spec in recipe.adapters.items() if not spec.merged}


def _adapter_size(spec: AdapterSpec, header: GgufHeader) -> fit.AdapterSize:
    options = spec.method.options.model_dump()
    rank = max([options["r"], *options.get("rank_pattern", {}).values()])
    # The largest placement may be chosen.
    targets = ALL_LINEAR if options["target_modules"] == AUTO else options["target_modules"]
    return fit.lora_size(header, rank, targets, dtype=spec.dtype)


def _merged(recipe: Recipe) -> list[str]:
    return [name for name, spec in recipe.adapters.items() if spec.merged]
