"""Predicts what a recipe's bundle needs on a board, and chooses settings for the board. Needs no torch."""

from __future__ import annotations

from edgetune_devices import boards, fit
from edgetune_runtime.formats.gguf_file import GgufHeader

from . import bases, methods
from .methods.common.peft import ALL_LINEAR, TargetOptions
from .methods.lora import AUTO
from .recipe.model import Recipe
from .targets import shapes_in


def needs_of_recipe(recipe: Recipe, header: GgufHeader, quantization: str | None) -> fit.Needs:
    """What the bundle of `recipe` will need; `quantization` None: the file with this header ships unchanged."""
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        quantization=quantization,
        adapters=_adapter_sizes(recipe, header),
        merged=_merged(recipe),
        merged_quantization=recipe.merged_quantization,
    )


def choose_for(recipe: Recipe, header: GgufHeader) -> fit.BoardChoice | None:
    """Choose settings for the recipe's board where the recipe leaves them unset; None if it sets no board.

    `header` is that of the base before quantization. Raises IncompatibleError if the bundle cannot fit, so a build
    fails before training.
    """
    if recipe.device is None:
        return None
    written = recipe.model_fields_set
    return fit.choose(
        boards.load(recipe.device),
        header,
        adapters=_adapter_sizes(recipe, header),
        merged=_merged(recipe),
        merged_quantization=recipe.merged_quantization,
        quantization=recipe.quantization,
        context_length=recipe.context_length if "context_length" in written else None,
        threads=recipe.threads,
        requantize=bases.quantization_of(recipe) is not None,
    )


def check_fit(recipe: Recipe, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if recipe.device is not None:
        fit.require_fit(needs_of_recipe(recipe, header, None), boards.load(recipe.device))


def _adapter_sizes(recipe: Recipe, header: GgufHeader) -> dict[str, fit.AdapterSize]:
    sizes = {name: _adapter_size(recipe, name, header) for name in recipe.adapters}
    return {name: size for name, size in sizes.items() if size is not None}


def _adapter_size(recipe: Recipe, name: str, header: GgufHeader) -> fit.AdapterSize | None:
    """Memory of an adapter in addition to the base; None if it is merged."""
    spec, shape = recipe.adapters[name], _shape(recipe, name)
    method, options = methods.load(spec.method.name), spec.method.options
    if shape == "prefix":
        return fit.AdapterSize(method.prefix_tokens(options) * fit.kv_bytes_per_token(header), 0)
    if shape == "tensors":
        # A few vectors or small networks: negligible compared to the base.
        return fit.AdapterSize(0, 0)
    if shape == "merged":
        return None
    targets = options.target_modules if isinstance(options, TargetOptions) else ALL_LINEAR
    if targets == AUTO:
        # The largest set that may be chosen.
        targets = ALL_LINEAR
    return fit.lora_size(header, method.shipped_rank(options), targets, dtype=spec.dtype)


def _merged(recipe: Recipe) -> list[str]:
    return [name for name in recipe.adapters if _shape(recipe, name) == "merged"]


def _shape(recipe: Recipe, name: str) -> str:
    """The adapter's shape in the format that the runtime opens by default."""
    spec, target = recipe.adapters[name], recipe.targets[0]
    return shapes_in((target,), spec.method.name, spec.method.options, merged=spec.merged)[target]
