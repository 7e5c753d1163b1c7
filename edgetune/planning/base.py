"""Plans the base: what the build does with its file or folder before training."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_runtime.formats.quantization import FLOATS

from edgetune.bases import BaseSource
from edgetune.recipe.model import Recipe

from .quantization import Candidate
from .records import BasePlan


def plan_base(
    recipe: Recipe,
    source: BaseSource | None,
    quantization: str | None,
    bytes_by_format: Mapping[str, int] | None = None,
    candidates: tuple[Candidate, ...] = (),
) -> BasePlan:
    """The plan of the base, as far as it is known; without its header there are no `bytes_by_format`."""
    steps = tuple(_steps(recipe, source, quantization))
    if source is None:
        return BasePlan(recipe.base, quantization, steps)
    parameters = None if source.header is None else source.header.parameters
    length = source.trained_context_length
    return BasePlan(
        recipe.base, quantization, steps, source.architecture, length, parameters, bytes_by_format or {}, candidates
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
