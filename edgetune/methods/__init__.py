"""Tuning methods, one file per method; the file name is the method's name, and a variant is in its method's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.registry import Registry
from edgetune_runtime.wording import suggestion

from .common.base import Checkpoint, Method, MethodOptions, TrainedModules

__all__ = [
    "Checkpoint",
    "Method",
    "MethodOptions",
    "TrainedModules",
    "load",
    "names",
    "of_folder",
    "shape_for",
    "unknown",
]

_FILES = Registry(__name__, "method", shared=("common",))
_VARIANTS = {"rslora": "lora", "loraplus": "lora", "olora": "pissa"}
"""Methods that are another one with other defaults, and the file of that one."""


def names() -> list[str]:
    """The names of all methods, from the files of this package, and of their variants."""
    return sorted([*_FILES.names(), *_VARIANTS])


def unknown(name: str) -> UsageError | None:
    """What is wrong with a name that no method has, to be raised; else None."""
    return None if name in names() else UsageError(f"no method {name!r}", suggestion(name, names()))


def load(name: str) -> Method[Any]:
    """The method called `name`. Raises UsageError, which suggests a similar name, if there is none."""
    error = unknown(name)
    if error is not None:
        raise error
    module = _FILES.load(_VARIANTS.get(name, name))
    variants: Sequence[Method[Any]] = getattr(module, "VARIANTS", ())
    return next((method for method in variants if method.variant == name), module.METHOD)


def of_folder(folder: Path) -> Method[Any]:
    """The method whose checkpoint is in `folder`, which may come from another PEFT training, by its config.

    If no method recognizes the config, this is LoRA, which reports what is wrong with it. Raises what `read_config`
    raises.
    """
    from edgetune_export.adapters.fold import read_config

    config = read_config(folder)
    return next((method for method in map(load, names()) if method.wrote(config)), load("lora"))


def shape_for(
    method: Method[Any], options: MethodOptions, backend: str, accepted: Sequence[str], *, merged: bool
) -> str:
    """The shape in which a backend writes a method: the first one that the backend accepts, or a merged model.

    Raises IncompatibleError with the remedy if there is none.
    """
    shapes = method.shapes(options)
    for shape in ("merged",) if merged else shapes:
        if shape in shapes and shape in accepted:
            return shape
    if merged:
        message = f"{method.name} cannot be merged into the base; it trains: {', '.join(shapes)}"
        raise IncompatibleError(message, "remove merged")
    message = f"{backend} does not support {method.name}, which exports to {' or '.join(shapes)}"
    raise IncompatibleError(message, "remove this target, or use another method, such as lora")
