"""One file a method; the file name is the method's name."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.wording import suggestion

from .common.base import Checkpoint, Method, MethodOptions

__all__ = ["Checkpoint", "Method", "MethodOptions", "load", "names", "of_folder", "shape_for"]


def names() -> list[str]:
    """The names of all methods, from the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def load(name: str) -> Method[Any]:
    """The method called `name`; UsageError names the methods there are."""
    if name not in names():
        raise UsageError(f"no method {name!r}", suggestion(name, names()))
    method: Method[Any] = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def of_folder(folder: Path) -> Method[Any]:
    """The method whose checkpoint lies in `folder`, which someone else may have trained with PEFT.

    LoRA, which says what is wrong with it, where nothing is recognized.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict):
        for name in names():
            method = load(name)
            if method.wrote(config):
                return method
    return load("lora")


def shape_for(
    method: Method[Any], options: MethodOptions, backend: str, accepted: Sequence[str], *, merged: bool
) -> str:
    """The shape that a backend writes of a method: the first of its shapes that is accepted, or a merged model.

    IncompatibleError with the way out when there is none.
    """
    shapes = method.shapes(options)
    for shape in ("merged",) if merged else shapes:
        if shape in shapes and shape in accepted:
            return shape
    if merged:
        message = f"what {method.name} trains ({', '.join(shapes)}) cannot be merged into the base"
        raise IncompatibleError(message, "leave merged out")
    message = f"{backend} cannot hold what {method.name} trains ({', '.join(shapes)})"
    raise IncompatibleError(message, "leave that target out, or take another method, such as lora")
