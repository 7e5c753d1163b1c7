"""The engines: one folder per format, whose ENGINES maps each task to the module that defines the class as ENGINE.

KV_TYPES of a folder that generates text lists the data types that keys and values can have, the default first. Its
module `needs` predicts memory (see `EngineNeeds`).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast, overload

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.registry import Registry

if TYPE_CHECKING:
    from .base import EngineClass, LabelEngineClass
    from .needs import EngineNeeds

_ENGINES = Registry(__name__, "engine", shared=("base", "checkpoints", "needs"))


def names() -> list[str]:
    """The names of all engines, from the folders of this package."""
    return _ENGINES.names()


def names_with_needs() -> list[str]:
    """The names of the engines whose memory and speed can be predicted."""
    return [name for name in names() if _has_needs(name)]


@cache
def _has_needs(name: str) -> bool:
    return find_spec(f"{__name__}.{name}.needs") is not None


def load_needs(name: str) -> EngineNeeds:
    """What predicts the memory of an engine; the name is one of `names_with_needs`."""
    return cast("EngineNeeds", _ENGINES.load(name, "needs"))


def check_name(name: str) -> None:
    """Raise UsageError, which suggests known names, for an unknown name."""
    error = _ENGINES.unknown(name)
    if error is not None:
        raise error


def check_kv(name: str, kv: str | None) -> str:
    """The data type of an engine's KV cache, by default its first one; UsageError for one that it does not have."""
    types: tuple[str, ...] = _ENGINES.load(name).KV_TYPES
    if kv is not None and kv not in types:
        message = f"{name} has no data type {kv!r} for keys and values"
        raise UsageError(message, f"choose one of: {', '.join(types)}")
    return kv or types[0]


@overload
def load(name: str) -> EngineClass: ...
@overload
def load(name: str, task: str) -> EngineClass | LabelEngineClass: ...
def load(name: str, task: str = GENERATION) -> EngineClass | LabelEngineClass:
    """Import the class of an engine for a task.

    UsageError for an unknown name suggests known ones; IncompatibleError for a task that it does not run lists others.
    """
    modules = _ENGINES.load(name).ENGINES
    if task not in modules:
        raise IncompatibleError(f"engine {name!r} does not run {task}", f"use it for: {', '.join(modules)}")
    engine_class: EngineClass | LabelEngineClass = _ENGINES.load(name, modules[task]).ENGINE
    return engine_class
