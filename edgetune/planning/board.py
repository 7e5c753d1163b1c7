"""Predicts what a recipe's bundle needs on a board, and chooses settings for the board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgetune_devices import boards, fit
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe

from .records import AdapterPlan, BoardPlan, BuildPlan

Adapters = Mapping[str, AdapterPlan]


@dataclass(frozen=True)
class Settings:
    """The recipe with the settings for its base and its board, the size of the base's GGUF file, and the prediction.

    `quantization` None: the base's file ships unchanged.
    """

    recipe: Recipe
    quantization: str | None
    gguf_bytes: int | None = None
    board: BoardPlan | None = None


def choose_settings(
    recipe: Recipe, adapters: Adapters, source: BaseSource | None, quantization: str | None
) -> Settings:
    """Choose the settings that the recipe leaves unset: for its board if it sets one, within what the base supports.

    `quantization` is that of the base if no board chooses one. Raises IncompatibleError if the bundle cannot fit on the
    board, so a build fails before training.
    """
    if source is None:
        return Settings(recipe, quantization)
    choice = None
    if recipe.device is not None and source.header is not None:
        choice = _choose(recipe, adapters, source.header, quantization)
        chosen = {"threads": choice.threads, "context_length": choice.context_length}
        recipe = recipe.model_copy(update={**chosen, "quantization": choice.quantization})
        quantization = choice.quantization
    # The default may be more than the base supports.
    length = min(recipe.context_length, source.trained_context_length)
    recipe = recipe.model_copy(update={"context_length": length})
    if source.header is None:
        return Settings(recipe, quantization)
    with_needs = engines.names_with_needs()
    counted = dict.fromkeys((gguf.NAME, *(target for target in recipe.targets if target in with_needs)))
    needs = {engine: bundle_needs(recipe, adapters, source.header, quantization, engine) for engine in counted}
    size = needs[gguf.NAME].base_bytes
    if choice is None:
        return Settings(recipe, quantization, size)
    board = boards.load(str(recipe.device))
    fits = [fit.fit(needs[target], board) for target in recipe.targets if target in needs]
    return Settings(recipe, quantization, size, BoardPlan(board.name, choice.reason, tuple(fits)))


def _choose(recipe: Recipe, adapters: Adapters, header: GgufHeader, quantization: str | None) -> fit.BoardChoice:
    engine = _engine(recipe)
    sizes, merged = _sizes(adapters, engine)
    return fit.choose(
        boards.load(str(recipe.device)),
        header,
        adapters=sizes,
        merged=merged,
        merged_quantization=recipe.merged_quantization,
        engine=engine,
        quantization=recipe.quantization,
        context_length=recipe.context_length if "context_length" in recipe.model_fields_set else None,
        threads=recipe.threads,
        requantize=quantization is not None,
    )


def bundle_needs(
    recipe: Recipe, adapters: Adapters, header: GgufHeader, quantization: str | None, engine: str | None = None
) -> fit.Needs:
    """What the bundle will need in `engine`, by default that of its first target.

    `quantization` None: the file with this header ships unchanged.
    """
    engine = engine or _engine(recipe)
    sizes, merged = _sizes(adapters, engine)
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        quantization=quantization,
        adapters=sizes,
        merged=merged,
        merged_quantization=recipe.merged_quantization,
        engine=engine,
    )


def check_fit(plan: BuildPlan, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if plan.recipe.device is not None:
        needs = bundle_needs(plan.recipe, plan.adapters, header, None)
        fit.require_fit(needs, boards.load(plan.recipe.device))


def _engine(recipe: Recipe) -> str:
    """The engine that opens the bundle by default; for one of an unknown format, sizes are those of GGUF."""
    return recipe.targets[0] if recipe.targets[0] in engines.names_with_needs() else gguf.NAME


def _sizes(adapters: Adapters, engine: str) -> tuple[dict[str, fit.AdapterSize], list[str]]:
    """The memory of the adapters in an engine, and the names of those that are merged models in it."""
    sizes = {name: adapter.memory[engine] for name, adapter in adapters.items() if engine in adapter.memory}
    return sizes, [name for name in adapters if name not in sizes]
