"""Chooses the settings that a recipe leaves to its board and its base."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgetune_devices import boards, fit
from edgetune_devices.changes import BOARD_QUANTIZATIONS
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe

from .base import plan_base
from .merged import with_grid
from .on_device import Adapters, bundle_needs
from .quantization import candidates_of, quantization_of, worth_measuring
from .records import BoardPlan, BuildPlan


def choose_settings(recipe: Recipe, adapters: Adapters, source: BaseSource | None) -> BuildPlan:
    """The plan with the settings that the recipe leaves unset: for its board if it sets one, within the base's limits.

    Raises IncompatibleError if the bundle cannot fit on the board, so a build fails before training, and the errors of
    `candidates_of`. Of a base with candidates, the plan is that with the largest, until they are measured.
    """
    header = None if source is None else source.header

    def needs_of(name: str | None, context_length: int | None = None, engine: str | None = None) -> Needs:
        assert header is not None
        return bundle_needs(recipe, adapters, header, name, engine, context_length=context_length)

    quantization, choice, choices = quantization_of(recipe), None, dict[str, Any]()
    of_file = partial(needs_of, engine=gguf.NAME if gguf.NAME in recipe.targets else None)
    candidates = [] if header is None else candidates_of(recipe, header, of_file)
    if candidates:
        quantization = candidates[0].quantization
    if recipe.device is not None and header is not None:
        choice = fit.choose(
            boards.load(recipe.device),
            needs_of,
            quantization=recipe.quantization if isinstance(recipe.quantization, str) else None,
            quantizations=[item.quantization for item in candidates] or BOARD_QUANTIZATIONS,
            context_length=recipe.context_length if "context_length" in recipe.model_fields_set else None,
            requantize=bool(candidates) or quantization is not None,
        )
        candidates = [item for item in candidates if item.quantization in choice.usable]
        quantization, threads = choice.quantization, recipe.threads or choice.board.cores
        requested = recipe.quantization if candidates else quantization
        choices = {"quantization": requested, "threads": threads, "context_length": choice.context_length}
    if source is not None:
        # The default may be more than the base supports.
        length = choices.get("context_length", recipe.context_length)
        choices["context_length"] = min(length, source.trained_context_length)
    chosen = recipe.model_copy(update=choices)
    counted = {gguf.NAME, *recipe.targets}.intersection(engines.names_with_needs() if header else ())
    needs = {engine: needs_of(quantization, chosen.context_length, engine) for engine in counted}
    sizes = {engine: item.base_bytes for engine, item in needs.items()}
    base = plan_base(chosen, source, quantization, sizes, worth_measuring(recipe, candidates))
    if header is not None:
        adapters = with_grid(chosen, adapters, base, TENSOR_TYPES[needs[gguf.NAME].main_type])
    board = None
    if choice is not None:
        fits = tuple(fit.fit(needs[target], choice.board) for target in recipe.targets if target in needs)
        board = BoardPlan(choice.board.name, choice.reason, fits)
    return BuildPlan(chosen, source, base, adapters, board)
