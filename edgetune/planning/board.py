"""Predicts what a recipe's bundle needs on a board, and chooses settings for the board."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_devices import boards, fit
from edgetune_runtime.engines import gguf
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.sizing.needs import COSTS

from edgetune import bases
from edgetune.recipe.model import Recipe

from .adapters import memory_size
from .records import AdapterPlan, BoardPlan, BuildPlan

Adapters = Mapping[str, AdapterPlan]


def choose_for(recipe: Recipe, adapters: Adapters, header: GgufHeader) -> fit.BoardChoice | None:
    """Choose settings for the recipe's board where the recipe leaves them unset; None if it sets no board.

    `header` is that of the base before quantization. Raises IncompatibleError if the bundle cannot fit, so a build
    fails before training.
    """
    if recipe.device is None:
        return None
    engine = _engine(recipe)
    sizes, merged = _sizes(recipe, adapters, engine)
    return fit.choose(
        boards.load(recipe.device),
        header,
        adapters=sizes,
        merged=merged,
        merged_quantization=recipe.merged_quantization,
        engine=engine,
        quantization=recipe.quantization,
        context_length=recipe.context_length if "context_length" in recipe.model_fields_set else None,
        threads=recipe.threads,
        requantize=bases.quantization_of(recipe) is not None,
    )


def bundle_needs(
    recipe: Recipe, adapters: Adapters, header: GgufHeader, quantization: str | None, engine: str | None = None
) -> fit.Needs:
    """What the bundle will need in `engine`, by default that of its first target.

    `quantization` None: the file with this header ships unchanged.
    """
    engine = engine or _engine(recipe)
    sizes, merged = _sizes(recipe, adapters, engine)
    return fit.needs_of_header(
        header,
        context_length=recipe.context_length,
        quantization=quantization,
        adapters=sizes,
        merged=merged,
        merged_quantization=recipe.merged_quantization,
        engine=engine,
    )


def engines_of(recipe: Recipe) -> list[str]:
    """The engines whose needs are known: that of GGUF, from which all formats are made, and those of the targets."""
    return list(dict.fromkeys((gguf.NAME, *(target for target in recipe.targets if target in COSTS))))


def plan_board(recipe: Recipe, choice: fit.BoardChoice, needs: Mapping[str, fit.Needs]) -> BoardPlan:
    """The prediction for the recipe's board; `needs` are by engine."""
    board = boards.load(str(recipe.device))
    engines = [target for target in recipe.targets if target in needs] or [gguf.NAME]
    return BoardPlan(board.name, choice.reason, tuple(fit.fit(needs[engine], board) for engine in engines))


def check_fit(plan: BuildPlan, header: GgufHeader) -> None:
    """IncompatibleError if the bundle of a base file with this header does not fit on the recipe's board."""
    if plan.recipe.device is not None:
        needs = bundle_needs(plan.recipe, plan.adapters, header, None)
        fit.require_fit(needs, boards.load(plan.recipe.device))


def _engine(recipe: Recipe) -> str:
    """The engine that opens the bundle by default; for one of an unknown format, sizes are those of GGUF."""
    return recipe.targets[0] if recipe.targets[0] in COSTS else gguf.NAME


def _sizes(recipe: Recipe, adapters: Adapters, engine: str) -> tuple[dict[str, fit.AdapterSize], list[str]]:
    """The memory of the adapters in an engine, and the names of those that are merged models in it."""
    target = engine if engine in recipe.targets else recipe.targets[0]
    sizes = {name: memory_size(adapter, engine, adapter.shapes[target]) for name, adapter in adapters.items()}
    return (
        {name: size for name, size in sizes.items() if size is not None},
        [name for name, size in sizes.items() if size is None],
    )
