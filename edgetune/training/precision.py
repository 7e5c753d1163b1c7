"""Checks whether this machine and a recipe's methods can train in the number formats that the recipe asks for."""

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
    """UsageError that names the first training of the recipe that is to be in int8 and cannot be.

    `device` tells torch's name of the device that trains; it is called only where int8 is asked for.
    """
    for where, training, method in _trainings(recipe):
        if training.precision == "int8":
            require_int8(method, device(), where=where)


def require_int8(method: Method[Any], device: str, *, machine: str = "", where: str = "") -> None:
    """UsageError where `method` cannot train in int8 on torch's `device` of a `machine` as `platform.machine` names it,
    by default this one; `where` is the part of the recipe that asks for it."""
    machine = machine or platform.machine()
    key = f"{where}training.precision"
    if method.trains_base:
        why = f"{method.name} trains the base's own weights, and int8 is for frozen ones"
    elif device != "cpu":
        why = f"training runs on {device}, and int8 is for CPUs"
    elif machine.lower() not in _X86:
        why = f"this machine is {machine}, and int8 is for x86"
    else:
        return
    raise UsageError(f"{key} is int8, but {why}", f"set {key}: fp32")


def _trainings(recipe: Recipe) -> Iterator[tuple[str, TrainingSpec, Method[Any]]]:
    """The recipe's trainings: the prefix of their keys, options and method."""
    for name, spec in recipe.adapters.items():
        yield f"adapters.{name}.", recipe.training.under(spec.training), methods.load(spec.method.name)
    if recipe.domain is not None:
        domain = recipe.domain
        yield "domain.", recipe.training.under(domain.training), methods.load(domain.method.name)
