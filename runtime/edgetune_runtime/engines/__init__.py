"""The engines: one folder each, named after the engine, whose module `engine` defines the class as ENGINE."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from edgetune_runtime.errors import UsageError

if TYPE_CHECKING:
    from .base import EngineClass


def names() -> list[str]:
    """The names of all engines, from the folders of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def load(name: str) -> EngineClass:
    """Import the class of an engine; UsageError for an unknown name lists all engines."""
    if name not in names():
        raise UsageError(f"no engine {name!r}", f"choose one of: {', '.join(names())}")
    found: EngineClass = import_module(f"{__name__}.{name}.engine").ENGINE
    return found
