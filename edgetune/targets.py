"""A method and the formats to export in, its shape in each out; refused before any work where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_export import backends
from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.errors import IncompatibleError

from . import methods
from .methods import MethodOptions
from .recipe.model import Recipe


def shapes_in(targets: Sequence[str], method: str, options: MethodOptions, *, merged: bool = False) -> dict[str, str]:
    """The shape of a method in each of the targets; IncompatibleError names one that can hold none of its shapes."""
    found = methods.load(method)
    return {
        target: methods.shape_for(found, options, target, backends.load(target).SHAPES, merged=merged)
        for target in targets
    }


def check_shapes(recipe: Recipe) -> None:
    """IncompatibleError that names the adapter whose method a target, an encoder or a scale cannot be used with."""
    for name, spec in recipe.adapters.items():
        method = methods.load(spec.method.name)
        shapes = method.shapes(spec.method.options)
        if recipe.task == CLASSIFICATION:
            if "low_rank" not in shapes or not method.takes_encoders:
                message = f"adapter {name!r}: an encoder cannot be tuned by {method.name}"
                raise IncompatibleError(message, "take another method, such as lora")
            continue
        try:
            shapes_in(recipe.targets, method.name, spec.method.options, merged=spec.merged)
        except IncompatibleError as error:
            raise IncompatibleError(f"adapter {name!r}: {error.message}", error.remedy) from error
        if spec.scale != 1.0 and not method.takes_scale:
            message = f"adapter {name!r}: what {method.name} trains has no scale"
            raise IncompatibleError(message, "leave scale out")
