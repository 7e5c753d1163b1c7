"""Finds plugins by listing the modules of a package: each module is one, such as an engine, under its own name."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection
from functools import cache
from importlib import import_module
from types import ModuleType

from .errors import UsageError
from .wording import suggestion


class Registry:
    """The modules of `package`, each one `kind` of thing, but those in `shared`, which the others have in common."""

    def __init__(self, package: str, kind: str, *, shared: Collection[str]) -> None:
        self._package, self._kind, self._shared = package, kind, shared

    def names(self) -> list[str]:
        """The names of the things, in alphabetical order; imports none of them."""
        return sorted(_modules(tuple(import_module(self._package).__path__)).difference(self._shared))

    def unknown(self, name: str) -> UsageError | None:
        """What is wrong with a name that nothing has, to be raised; else None."""
        names = self.names()
        return None if name in names else UsageError(f"no {self._kind} {name!r}", suggestion(name, names))

    def load(self, name: str, part: str = "") -> ModuleType:
        """The module of this name, or its submodule `part`; UsageError when there is no such name."""
        error = self.unknown(name)
        if error is not None:
            raise error
        return import_module(".".join(filter(None, (self._package, name, part))))


@cache
def _modules(folders: tuple[str, ...]) -> frozenset[str]:
    """The names of the modules in these folders; opening a bundle asks for them ten times."""
    return frozenset(module.name for module in pkgutil.iter_modules(folders))
