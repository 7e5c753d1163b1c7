"""One folder per format, named after it: FORMAT in the package has its facts, and names the module that writes it."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, cast

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import UsageError

if TYPE_CHECKING:
    from .base import Backend
    from .format import Format

DEFAULT = "gguf"
"""The format that is written unless others are asked for."""


def names() -> tuple[str, ...]:
    """The names of all formats, from the folders of this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))


def load(name: str, task: str = GENERATION) -> Backend:
    """What writes a format for a task, imported when it is needed; UsageError names the formats there are."""
    modules = format_of(name).tasks
    if task not in modules:
        raise UsageError(f"{name} holds no models for {task}", f"choose one of: {', '.join(of_task(task)) or 'none'}")
    return cast("Backend", import_module(f"{__name__}.{name}.{modules[task]}"))


def format_of(name: str) -> Format:
    """The facts of a format; UsageError names the formats there are."""
    _check(name)
    return cast("Format", import_module(f"{__name__}.{name}").FORMAT)


def of_task(task: str) -> tuple[str, ...]:
    """The formats that hold models for a task."""
    return tuple(name for name in names() if task in format_of(name).tasks)


def _check(name: str) -> None:
    if name not in names():
        raise UsageError(f"no format {name!r}", f"choose one of: {', '.join(names())}")
