"""The formats, one folder each: FORMAT in it has the facts of the format, and names the modules that write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import UsageError
from edgetune_runtime.registry import Registry

if TYPE_CHECKING:
    from .base import Backend
    from .format import Format

DEFAULT = "gguf"
"""The format that is written unless others are asked for."""

_FORMATS = Registry(__name__, "format", shared=("base", "format"))


def names() -> list[str]:
    """The names of all formats, from the folders of this package."""
    return _FORMATS.names()


def unknown(name: str) -> UsageError | None:
    """What is wrong with a name that no format has, to be raised; else None."""
    return _FORMATS.unknown(name)


def load(name: str, task: str = GENERATION) -> Backend:
    """What writes a format for a task, imported when it is needed; UsageError names the formats there are."""
    modules = format_of(name).tasks
    if task not in modules:
        raise UsageError(f"{name} holds no models for {task}", f"choose one of: {', '.join(of_task(task)) or 'none'}")
    return cast("Backend", _FORMATS.load(name, modules[task]))


def format_of(name: str) -> Format:
    """The facts of a format; UsageError names the formats there are."""
    return cast("Format", _FORMATS.load(name).FORMAT)


def of_task(task: str) -> tuple[str, ...]:
    """The formats that support a task."""
    return tuple(name for name in names() if task in format_of(name).tasks)
