"""Checks that this machine and the recipe's methods support the precision that the recipe sets."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any

from edgetune_runtime.errors import UsageError

from edgetune import methods
from edgetune.methods import Method
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import TrainingSpec

_X86 = frozenset({"x86_64", "amd64"})


def check_precision(recipe: Recipe, device: Callable[[], str]) -> None:
    """UsageError for the first training run of the recipe that sets int8 where it is not supported.

    `device` returns torch's name of the training device; it is called only if the recipe sets int8.
    """
    for where, training, method in _trainings(recipe):
        if training.precision == "int8":
            require_int8(method, device(), where=where)


def require_int8(method: Method[Any], device: str, *, machine: str = "", where: str = "") -> None:
    """UsageError if `method` cannot train in int8 on torch's `device`.

    `machine` is a name as in `platform.machine()`, by default this machine's; `where` is the prefix of the recipe key.
    """
    machine = machine or platform.machine()
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


def _trainings(recipe: Recipe) -> Iterator[tuple[str, TrainingSpec, Method[Any]]]:
    """For each training run of the recipe: the prefix of its keys, its options and its method."""
    for name, spec in recipe.adapters.items():
        yield f"adapters.{name}.", recipe.training.under(spec.training), methods.load(spec.method.name)
    if recipe.domain is not None:
        domain = recipe.domain
        yield "domain.", recipe.training.under(domain.training), methods.load(domain.method.name)
