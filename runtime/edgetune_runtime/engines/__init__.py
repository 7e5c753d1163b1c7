"""The engines: one folder per format, whose ENGINES maps each task to the module that defines the class as ENGINE."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, overload

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    from .base import EngineClass, LabelEngineClass


def names() -> list[str]:
    """The names of all engines, from the folders of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def check_name(name: str) -> None:
    """Raise UsageError, which lists all engines, for an unknown name."""
    if name not in names():
        raise UsageError(f"no engine {name!r}", f"choose one of: {', '.join(names())}")


@overload
def load(name: str) -> EngineClass: ...
@overload
def load(name: str, task: str) -> EngineClass | LabelEngineClass: ...
def load(name: str, task: str = GENERATION) -> EngineClass | LabelEngineClass:
    """Import the class of an engine for a task.

    UsageError for an unknown name lists all engines; IncompatibleError for a task that it does not run lists its tasks.
    """
    check_name(name)
    package = f"{__name__}.{name}"
    modules = import_module(package).ENGINES
    if task not in modules:
        raise IncompatibleError(f"engine {name!r} does not run {task}", f"use it for: {', '.join(modules)}")
    found: EngineClass | LabelEngineClass = import_module(f"{package}.{modules[task]}").ENGINE
    return found
