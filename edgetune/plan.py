"""Recipe and its base's header in; what the bundle will need on a board, and what the board chooses, out. No torch."""

from __future__ import annotations

from edgetune_devices import boards, fit
from edgetune_runtime.formats.gguf_file import GgufHeader

from . import methods
from .methods.common.peft import ALL_LINEAR, TargetOptions
from .methods.lora import AUTO
from .recipe.model import Recipe
from .targets import shapes_in


def needs_of_recipe(recipe: Recipe, header: GgufHeader, *, requantize: bool) -> fit.Needs:
    """What the bundle of `recipe` will take; `requantize`: the build quantizes the base as the recipe says."""
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        scheme=recipe.quantize if requantize else None,
        adapters=_adapter_sizes(recipe, header),
        merged=_merged(recipe),
        quantize_merged=recipe.quantize_merged,
    )


def choose_for(recipe: Recipe, header: GgufHeader, *, requantize: bool) -> fit.BoardChoice | None:
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
        quantize_merged=recipe.quantize_merged,
        quantize=recipe.quantize if requantize else None,
        context_length=recipe.context_length if "context_length" in written else None,
        threads=recipe.threads,
        requantize=requantize,
    )


def _adapter_sizes(recipe: Recipe, header: GgufHeader) -> dict[str, fit.AdapterSize]:
    sizes = {name: _adapter_size(recipe, name, header) for name in recipe.adapters}
    return {name: size for name, size in sizes.items() if size is not None}


def _adapter_size(recipe: Recipe, name: str, header: GgufHeader) -> fit.AdapterSize | None:
    """What lies beside the base for an adapter; None for what is merged."""
    spec, shape = recipe.adapters[name], _shape(recipe, name)
    method, options = methods.load(spec.method.name), spec.method.options
    if shape == "prefix":
        return fit.AdapterSize(method.prefix_tokens(options) * fit.kv_bytes_per_token(header), 0)
    if shape == "tensors":
        # A vector or a small network in a few places: next to nothing beside a base.
        return fit.AdapterSize(0, 0)
    if shape == "merged":
        return None
    targets = options.target_modules if isinstance(options, TargetOptions) else ALL_LINEAR
    if targets == AUTO:
        # The most that may be chosen.
        targets = ALL_LINEAR
    return fit.lora_size(header, method.shipped_rank(options), targets, dtype=spec.dtype)


def _merged(recipe: Recipe) -> list[str]:
    return [name for name in recipe.adapters if _shape(recipe, name) == "merged"]


def _shape(recipe: Recipe, name: str) -> str:
    """The shape in the format that the bundle opens by default."""
    spec, target = recipe.adapters[name], recipe.targets[0]
    return shapes_in((target,), spec.method.name, spec.method.options, merged=spec.merged)[target]
