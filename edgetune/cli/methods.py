"""`edgetune methods`: the tuning methods, their shape in each format, and their options, on standard output."""

from __future__ import annotations

import inspect
from typing import Any

from edgetune_export import backends
from edgetune_runtime.errors import IncompatibleError

from edgetune import methods
from edgetune.methods import Method
from edgetune.recipe.problems import other_names
from edgetune.targets import shapes_in


def names() -> list[str]:
    """The names of all methods."""
    return methods.names()


def describe(name: str) -> dict[str, Any]:
    """A method as JSON values: description, shapes, shape in each backend (null: not supported) and options."""
    method = methods.load(name)
    defaults = method.options()
    schema = method.options.model_json_schema(by_alias=False)["properties"]
    return {
        "about": inspect.cleandoc(type(method).__doc__ or "").splitlines()[0],
        "shapes": list(method.shapes(defaults)),
        "backends": {target: _shape(name, method, target) for target in backends.names()},
        "options": {
            key: {
                "default": value,
                "other_names": other_names(key, method.options),
                "description": schema[key].get("description", ""),
            }
            for key, value in defaults.model_dump(mode="json").items()
        },
    }


def table() -> list[str]:
    """One line per method: its name, its shape in each backend, and its description."""
    lines = [("method", *backends.names(), "")]
    for name in names():
        found = describe(name)
        lines.append((name, *(found["backends"][target] or "-" for target in backends.names()), found["about"]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(backends.names()) + 1)]
    return ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines]


def _shape(name: str, method: Method[Any], target: str) -> str | None:
    try:
        return shapes_in((target,), name, method.options())[target]
    except IncompatibleError:
        return None
