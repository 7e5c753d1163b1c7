"""Chooses the settings that a recipe leaves to its board and its base."""

from __future__ import annotations

from typing import Any

from edgetune_devices import boards, fit
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe

from .base import plan_base
from .merged import with_grid
from .on_device import Adapters, bundle_needs
from .quantization import candidates_of, quantizations_of, worth_measuring
from .records import BoardPlan, BuildPlan


def choose_settings(recipe: Recipe, adapters: Adapters, source: BaseSource | None) -> BuildPlan:
    """The plan with the settings that the recipe leaves unset: for its board if it sets one, within the base's limits.

    Raises IncompatibleError if the bundle cannot fit on the board, so a build fails before training, and the errors of
    `candidates_of`. Of a base with candidates, the plan is that with the largest, until they are measured.
    """
    header = None if source is None else source.header

    def needs_of(quantization: str | None, context_length: int, engine: str | None = None) -> Needs:
        assert header is not None
        return bundle_needs(recipe, adapters, header, quantization, engine, context_length=context_length)

    candidates = [] if header is None else candidates_of(recipe, header)
    usable, choice, settings = quantizations_of(recipe, candidates), None, dict[str, Any]()
    if recipe.device is not None and header is not None:
        lengths = [recipe.context_length] if "context_length" in recipe.model_fields_set else fit.CONTEXT_LENGTHS
        choice = fit.choose(boards.load(recipe.device), needs_of, usable, lengths)
        usable, threads = choice.usable, recipe.threads or choice.board.cores
        candidates = [item for item in candidates if item.quantization in usable]
        settings = {"threads": threads, "context_length": choice.context_length}
        if not candidates:
            settings["quantization"] = usable[0]
    if source is not None:
        # The default may be more than the base supports.
        length = settings.get("context_length", recipe.context_length)
        settings["context_length"] = min(length, source.trained_context_length)
    chosen = recipe.model_copy(update=settings)
    counted = {gguf.NAME, *recipe.targets}.intersection(engines.names_with_needs() if header else ())
    needs = {engine: needs_of(usable[0], chosen.context_length, engine) for engine in counted}
    sizes = {engine: item.base_bytes for engine, item in needs.items()}
    base = plan_base(chosen, source, usable[0], sizes, worth_measuring(recipe, candidates))
    if header is not None:
        adapters = with_grid(chosen, adapters, base, TENSOR_TYPES[needs[gguf.NAME].main_type])
    board = None
    if choice is not None:
        fits = tuple(fit.fit(needs[target], choice.board) for target in recipe.targets if target in needs)
        board = BoardPlan(choice.board.name, choice.reason, fits)
    return BuildPlan(chosen, source, base, adapters, board)
