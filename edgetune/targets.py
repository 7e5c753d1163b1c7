"""Matches tuning methods with the formats of a recipe, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from edgetune_export import backends
from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import IncompatibleError

from . import methods
from .methods import MethodOptions
from .recipe.model import Recipe


def shapes_in(
    targets: Sequence[str], method: str, options: MethodOptions, *, merged: bool = False, task: str = GENERATION
) -> dict[str, str]:
    """The shape of a method in each target; IncompatibleError names a target that supports none of its shapes."""
    loaded = methods.load(method)
    return {
        target: methods.shape_for(loaded, options, target, backends.load(target, task).SHAPES, merged=merged)
        for target in targets
    }


def supported_shapes(targets: Sequence[str], method: str) -> dict[str, str]:
    """The shape of a method with its defaults in each of these targets that supports it."""
    shapes: dict[str, str] = {}
    for target in targets:
        with suppress(IncompatibleError):
            shapes |= shapes_in((target,), method, methods.load(method).options())
    return shapes


def shapes_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The shapes of each adapter; IncompatibleError names one whose method does not work with a target or a scale."""
    shapes = {}
    for name, spec in recipe.adapters.items():
        method, options = spec.method.name, spec.method.options
        try:
            shapes[name] = shapes_in(recipe.targets, method, options, merged=spec.merged, task=recipe.task)
        except IncompatibleError as error:
            raise IncompatibleError(f"adapter {name!r}: {error.message}", error.remedy) from error
        if spec.scale != 1.0 and not methods.load(method).takes_scale:
            message = f"adapter {name!r}: what {method} trains has no scale"
            raise IncompatibleError(message, "leave scale out")
    return shapes
