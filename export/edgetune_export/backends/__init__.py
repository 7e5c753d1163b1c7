"""One folder per format; the folder's name is the format's, and its module `backend` is a Backend (see base.py)."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, cast

from edgetune_runtime.errors import UsageError

if TYPE_CHECKING:
    from .base import Backend


def names() -> tuple[str, ...]:
    """The names of all formats, from the folders of this package."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))


def load(name: str) -> Backend:
    """What writes a format, imported when it is needed; UsageError names the formats there are."""
    if name not in names():
        raise UsageError(f"no format {name!r}", f"choose among: {', '.join(names())}")
    return cast("Backend", import_module(f"{__name__}.{name}.backend"))
