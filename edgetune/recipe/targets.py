"""Matches tuning methods with the formats of a recipe and the layers of its base, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from edgetune_export import backends
from edgetune_export.adapters.shapes import LowRank
from edgetune_export.architectures.base import Architecture
from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import IncompatibleError, naming

from edgetune import methods
from edgetune.methods import MethodOptions

from .model import Recipe


def misfit(method: str, shapes: Mapping[str, str], architecture: Architecture) -> str:
    """Why a method with these shapes cannot tune a base of this architecture, after its name; empty if it can."""
    if architecture.is_recurrent and not methods.load(method).takes_recurrent_layers:
        return "needs attention, which some layers of this base do not have"
    if not architecture.has_equal_caches and "prefix" in shapes.values():
        return "is a prefix of keys and values, which differ in the layers of this base"
    return ""


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
    """The shape of each adapter in each target.

    IncompatibleError names one whose method does not work with a target, a scale or encoders.
    """
    if recipe.task_type.has_encoders:
        _check_encoder_methods(recipe)
        return {name: dict.fromkeys(recipe.targets, LowRank.shape) for name in recipe.adapters}
    shapes = {}
    for name, spec in recipe.adapters.items():
        method, options = spec.method.name, spec.method.options
        with naming(f"adapter {name!r}"):
            shapes[name] = shapes_in(recipe.targets, method, options, merged=spec.merged, task=recipe.task)
        if spec.scale != 1.0 and not methods.load(method).takes_scale:
            message = f"adapter {name!r}: what {method} trains has no scale"
            raise IncompatibleError(message, "leave scale out")
    return shapes


def _check_encoder_methods(recipe: Recipe) -> None:
    for name, spec in recipe.adapters.items():
        method = methods.load(spec.method.name)
        if LowRank.shape not in method.shapes(spec.method.options) or not method.takes_encoders:
            message = f"adapter {name!r}: {method.name} does not work with encoders"
            raise IncompatibleError(message, "use another method, such as lora")
