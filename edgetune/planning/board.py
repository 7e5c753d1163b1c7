"""Chooses the settings that a recipe leaves to its board and its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgetune_devices import boards, fit
from edgetune_devices.needs import engine_of, needs_of_header
from edgetune_export import backends
from edgetune_export.adapters.shapes import Merged
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import FLOATS

from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe
from edgetune.training.precision import refuse_int8

from .on_device import Adapters, bundle_needs, domain_grid_types, grid_types, quantization_in
from .quantization import Candidate, candidates_of, quantizations_of, worth_measuring
from .records import AdapterPlan, BasePlan, BoardPlan, BuildPlan


def choose_settings(recipe: Recipe, adapters: Adapters, source: BaseSource | None) -> BuildPlan:
    """The plan with the settings that the recipe leaves unset: for its board if it sets one, within the base's limits.

    Raises IncompatibleError if the bundle cannot fit on the board, so a build fails before training, UsageError for a
    merged model or a domain that cannot be trained in int8, and the errors of `candidates_of`. Of a base with
    candidates, the plan is that with the largest, until they are measured.
    """
    header = None if source is None else source.header

    def needs_of(quantization: str | None, context_length: int, engine: str | None = None) -> Needs:
        assert header is not None
        return bundle_needs(recipe, adapters, header, quantization, engine, context_length=context_length)

    candidates = [] if header is None else candidates_of(recipe, header)
    usable, choice, settings = quantizations_of(recipe, candidates), None, dict[str, Any]()
    if recipe.device is not None and source is not None and header is not None:
        is_set, longest = "context_length" in recipe.model_fields_set, source.trained_context_length
        lengths = [recipe.context_length] if is_set else [*dict.fromkeys(min(n, longest) for n in fit.CONTEXT_LENGTHS)]
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
    base = _plan_base(chosen, source, usable[0], sizes, worth_measuring(recipe, candidates))
    if header is not None:
        quantizations = [item.quantization for item in base.candidates] or [base.quantization]
        _check_domain(chosen, header, quantizations)
        adapters = _with_merged(chosen, adapters, base, header, quantizations)
    board = None
    if choice is not None:
        fits = tuple(fit.fit(needs[target], choice.board) for target in recipe.targets if target in needs)
        board = BoardPlan(choice.board.name, choice.reason, fits)
    return BuildPlan(chosen, source, base, adapters, board)


def _plan_base(
    recipe: Recipe,
    source: BaseSource | None,
    quantization: str | None,
    bytes_by_format: Mapping[str, int],
    candidates: tuple[Candidate, ...],
) -> BasePlan:
    """The plan of the base, as far as it is known; `bytes_by_format` is empty without its header."""
    steps = tuple(_steps(recipe, source, quantization))
    if source is None:
        return BasePlan(recipe.base, quantization, steps)
    parameters = None if source.header is None else source.header.parameters
    length = source.trained_context_length
    return BasePlan(
        recipe.base, quantization, steps, source.architecture, length, parameters, bytes_by_format, candidates
    )


def _steps(recipe: Recipe, source: BaseSource | None, quantization: str | None) -> list[str]:
    """What the build does with the base before training."""
    steps = [] if source is not None else ["download"]
    matrix = "" if recipe.imatrix is None else " with an importance matrix"
    if recipe.quantization_spec is not None:
        steps += [f"measure quantizations{matrix}", "use the best one"]
    elif quantization is not None and source is not None and not source.is_folder:
        steps += [f"requantize to {quantization}{matrix}"]
    elif quantization in FLOATS:
        steps += [f"convert to GGUF {quantization}"]
    elif quantization is not None:
        steps += ["convert to GGUF", f"quantize to {quantization}{matrix}"]
    return steps if recipe.domain is None else [*steps, "continue pretraining"]


def _check_domain(recipe: Recipe, header: GgufHeader, quantizations: Sequence[str | None]) -> None:
    """UsageError for a domain that is to be trained in int8 through the rounding to the grid of one of these bases."""
    if recipe.domain is None:
        return
    training = recipe.training.under(recipe.domain.training)
    for types in filter(None, (domain_grid_types(recipe, header, quantization) for quantization in quantizations)):
        refuse_int8("domain", training, types, "set domain.training.precision: auto, or quantization: q8_0")


def _with_merged(
    recipe: Recipe, adapters: Adapters, base: BasePlan, header: GgufHeader, quantizations: Sequence[str | None]
) -> dict[str, AdapterPlan]:
    """The adapters with the sizes of merged models; those that keep the base's types are trained through the rounding.

    UsageError for one that is to be trained in int8, whichever candidate is chosen.
    """
    planned = dict(adapters)
    for name, adapter in adapters.items():
        grids = {chosen: grid_types(recipe, adapter, header, chosen) for chosen in quantizations}
        for types in filter(None, grids.values()):
            refuse_int8(
                f"adapters.{name}",
                recipe.training.under(adapter.spec.training),
                types,
                "set training.precision: auto, or merged_quantization: q8_0",
            )
        merged = quantization_in(recipe, adapter, header, base.quantization)
        sizes = {
            target: _bytes_in(target, recipe, header, merged)
            for target, shape in adapter.shapes.items()
            if shape == Merged.shape
        }
        sizes = {**adapter.bytes_by_format, **sizes}
        planned[name] = replace(adapter, on_grid=bool(grids[base.quantization]), bytes_by_format=sizes)
    return planned


def _bytes_in(target: str, recipe: Recipe, header: GgufHeader, quantization: str | None) -> int:
    """The size of a whole model in a format."""
    size = needs_of_header(header, context_length=1, quantization=quantization, engine=engine_of(target)).base_bytes
    return int(backends.format_of(target).base_bytes(size, header.parameters, recipe.format_options))
