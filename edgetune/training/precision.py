"""The precision of a training, and whether the device and the method support it. Needs no torch."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune import methods
from edgetune.methods import Method
from edgetune.recipe.model import Recipe
from edgetune.recipe.training import TrainingSpec

from .device import TrainingDevice

_X86 = frozenset({"x86_64", "amd64"})


def check_precision(recipe: Recipe, device: TrainingDevice) -> None:
    """UsageError for the first training run of the recipe that sets int8 where `device` does not support it."""
    for where, training, method in _trainings(recipe):
        if training.precision == "int8":
            require_int8(method, device.kind, where=where)


def precision_on(device: TrainingDevice, training: TrainingSpec) -> str:
    """The precision of a training on `device`: what the recipe sets, or for `auto` bf16 if it multiplies that fast."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if device.multiplies_bf16 else "fp32"


def require_int8(method: Method[Any], device: str, *, where: str = "") -> None:
    """UsageError if `method` cannot train in int8 on such a `device`; `where` is the prefix of the recipe key."""
    machine = platform.machine()
    key = f"{where}training.precision"
    if method.trains_base:
        why = f"{method.name} trains the base's own weights, and int8 needs frozen weights"
    elif device != "cpu":
        why = f"training runs on {device}, and int8 needs a CPU"
    elif machine.lower() not in _X86:
        why = f"this machine is {machine}, and int8 needs x86"
    else:
        return
    raise UsageError(f"{key} is int8, but {why}", f"set {key}: fp32")


def refuse_int8(where: str, training: TrainingSpec, types: Iterable[str], remedy: str) -> None:
    """UsageError if a training through the rounding to the grid of these tensor types is to be in int8.

    `where` is the key of the recipe that is trained.
    """
    if training.precision == "int8":
        rounded = ", ".join(name for name in types if not TENSOR_TYPES[name].is_float)
        raise UsageError(f"{where} is trained with weights rounded to {rounded}, and not in int8", remedy)


def _trainings(recipe: Recipe) -> Iterator[tuple[str, TrainingSpec, Method[Any]]]:
    """For each training run of the recipe: the prefix of its keys, its options and its method."""
    for name, spec in recipe.adapters.items():
        yield f"adapters.{name}.", recipe.training.under(spec.training), methods.load(spec.method.name)
    if recipe.domain is not None:
        domain = recipe.domain
        yield "domain.", recipe.training.under(domain.training), methods.load(domain.method.name)
