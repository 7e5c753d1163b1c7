"""One file a method; the file name is the method's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from edgetune_runtime.errors import UsageError

from ._base import Method, Options

__all__ = ["Method", "Options", "load", "names"]


def names() -> list[str]:
    """The names of all methods, from the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> Method:
    """The method called `name`; UsageError names the methods there are."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(names())}"
        raise UsageError(f"no method {name!r}", hint)
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    return method
