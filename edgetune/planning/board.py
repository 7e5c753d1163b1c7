"""Plans the base, chooses settings for the recipe's board, and predicts what the bundle needs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgetune_devices import boards, fit
from edgetune_devices.changes import BOARD_QUANTIZATIONS
from edgetune_devices.needs import main_type_of, needs_of_header
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.needs import AdapterSize, Needs
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import DEFAULT, FLOATS

from edgetune.bases import BaseSource, is_gguf
from edgetune.recipe import task_types
from edgetune.recipe.model import Recipe

from .merged import trains_on_grid, with_grid
from .quantization import Candidate, candidates_of, worth_measuring
from .records import AdapterPlan, BasePlan, BoardPlan, BuildPlan

Adapters = Mapping[str, AdapterPlan]


def choose_settings(recipe: Recipe, adapters: Adapters, source: BaseSource | None) -> BuildPlan:
    """The plan with the settings that the recipe leaves unset: for its board if it sets one, within the base's limits.

    Raises IncompatibleError if the bundle cannot fit on the board, so a build fails before training, and the errors of
    `candidates_of`. Of a base with candidates, the plan is that with the largest, until they are measured.
    """
    quantization = quantization_of(recipe)
    if source is None:
        return BuildPlan(recipe, source, _plan_base(recipe, source, quantization), adapters)
    choice, candidates = None, _candidates(recipe, adapters, source.header)
    if candidates:
        quantization = candidates[0].quantization
    if recipe.device is not None and source.header is not None:
        choice = _choose(
            recipe, adapters, source.header, candidates, requantize=bool(candidates) or quantization is not None
        )
        candidates = [item for item in candidates if item.quantization in choice.usable]
        quantization, threads = choice.quantization, recipe.threads or choice.board.cores
        chosen = recipe.quantization if candidates else quantization
        recipe = recipe.model_copy(
            update={"quantization": chosen, "threads": threads, "context_length": choice.context_length}
        )
    # The default may be more than the base supports.
    length = min(recipe.context_length, source.trained_context_length)
    recipe = recipe.model_copy(update={"context_length": length})
    if source.header is None:
        return BuildPlan(recipe, source, _plan_base(recipe, source, quantization), adapters)
    counted = {gguf.NAME, *recipe.targets}.intersection(engines.names_with_needs())
    needs = {engine: bundle_needs(recipe, adapters, source.header, quantization, engine) for engine in counted}
    base = _plan_base(recipe, source, quantization, needs[gguf.NAME].base_bytes)
    base = replace(base, candidates=worth_measuring(recipe, candidates))
    adapters = with_grid(recipe, adapters, base, main_type_of(source.header, quantization))
    if choice is None:
        return BuildPlan(recipe, source, base, adapters)
    fits = tuple(fit.fit(needs[target], choice.board) for target in recipe.targets if target in needs)
    return BuildPlan(recipe, source, base, adapters, BoardPlan(choice.board.name, choice.reason, fits))


def quantization_of(recipe: Recipe) -> str | None:
    """The quantization of the base if neither a board nor the build chooses one.

    None if its file ships unchanged or the build chooses, and for an encoder.
    """
    if recipe.quantization is None or isinstance(recipe.quantization, str):
        ships_unchanged = is_gguf(recipe.base) or "quantization" in task_types.load(recipe.task).refused_keys
        return recipe.quantization or (None if ships_unchanged else DEFAULT)
    return None


def _candidates(recipe: Recipe, adapters: Adapters, header: GgufHeader | None) -> list[Candidate]:
    if header is None:
        return []
    engine = gguf.NAME if gguf.NAME in recipe.targets else _engine(recipe)
    return candidates_of(recipe, header, lambda name: bundle_needs(recipe, adapters, header, name, engine).base_bytes)


def _plan_base(
    recipe: Recipe, source: BaseSource | None, quantization: str | None, gguf_bytes: int | None = None
) -> BasePlan:
    steps = tuple(_steps(recipe, source, quantization))
    if source is None:
        return BasePlan(recipe.base, quantization, steps)
    parameters = None if source.header is None else source.header.parameters
    length = source.trained_context_length
    return BasePlan(recipe.base, quantization, steps, source.architecture, length, parameters, gguf_bytes)


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


def _choose(
    recipe: Recipe, adapters: Adapters, header: GgufHeader, candidates: Sequence[Candidate], *, requantize: bool
) -> fit.BoardChoice:
    def needs_of(quantization: str | None, context_length: int) -> Needs:
        candidate = recipe.model_copy(update={"context_length": context_length})
        return bundle_needs(candidate, adapters, header, quantization)

    return fit.choose(
        boards.load(str(recipe.device)),
        needs_of,
        quantization=recipe.quantization if isinstance(recipe.quantization, str) else None,
        quantizations=[item.quantization for item in candidates] or BOARD_QUANTIZATIONS,
        context_length=recipe.context_length if "context_length" in recipe.model_fields_set else None,
        requantize=requantize,
    )


def bundle_needs(
    recipe: Recipe, adapters: Adapters, header: GgufHeader, quantization: str | None, engine: str | None = None
) -> Needs:
    """What the bundle will need in `engine`, by default that of its first target.

    `quantization` None: the file with this header ships unchanged.
    """
    engine = engine or _engine(recipe)
    sizes, merged = _sizes(adapters, engine)
    return needs_of_header(
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


def _sizes(adapters: Adapters, engine: str) -> tuple[dict[str, AdapterSize], dict[str, bool]]:
    """The memory of the adapters in an engine; of its merged models, whether they can be trained on the base's grid."""
    sizes = {name: adapter.memory[engine] for name, adapter in adapters.items() if engine in adapter.memory}
    return sizes, {name: trains_on_grid(adapter) for name, adapter in adapters.items() if name not in sizes}
