"""Predicts what a recipe's bundle needs on a board, and chooses settings for the board. Needs no torch."""

from __future__ import annotations

from edgetune_devices import boards, fit
from edgetune_export.architectures.shape import BaseShape
from edgetune_runtime.engines import gguf
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.sizing.needs import COSTS

from . import bases
from .adapter_sizes import size_in_memory
from .recipe.model import Recipe
from .targets import shapes_in


def needs_of_recipe(
    recipe: Recipe, header: GgufHeader, quantization: str | None, engine: str | None = None
) -> fit.Needs:
    """What the bundle of `recipe` will need in `engine`, by default that of its first target.

    `quantization` None: the file with this header ships unchanged.
    """
    engine = engine or _engine(recipe)
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        quantization=quantization,
        adapters=_adapter_sizes(recipe, header, engine),
        merged=_merged(recipe),
        merged_quantization=recipe.merged_quantization,
        engine=engine,
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
        adapters=_adapter_sizes(recipe, header, _engine(recipe)),
        merged=_merged(recipe),
        merged_quantization=recipe.merged_quantization,
        engine=_engine(recipe),
        quantization=recipe.quantization,
        context_length=recipe.context_length if "context_length" in written else None,
        threads=recipe.threads,
        requantize=bases.quantization_of(recipe) is not None,
    )


def check_fit(recipe: Recipe, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if recipe.device is not None:
        fit.require_fit(needs_of_recipe(recipe, header, None), boards.load(recipe.device))


def _engine(recipe: Recipe) -> str:
    """The engine that opens the bundle by default; for one of an unknown format, sizes are those of GGUF."""
    return recipe.targets[0] if recipe.targets[0] in COSTS else gguf.NAME


def _adapter_sizes(recipe: Recipe, header: GgufHeader, engine: str) -> dict[str, fit.AdapterSize]:
    base = BaseShape.of_header(header)
    sizes = {
        name: size_in_memory(spec.method, _shape(recipe, name), base, engine, dtype=spec.dtype)
        for name, spec in recipe.adapters.items()
    }
    return {name: size for name, size in sizes.items() if size is not None}


def _merged(recipe: Recipe) -> list[str]:
    return [name for name in recipe.adapters if _shape(recipe, name) == "merged"]


def _shape(recipe: Recipe, name: str) -> str:
    """The adapter's shape in the format that the runtime opens by default."""
    spec, target = recipe.adapters[name], recipe.targets[0]
    return shapes_in((target,), spec.method.name, spec.method.options, merged=spec.merged)[target]
