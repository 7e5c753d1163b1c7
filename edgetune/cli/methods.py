"""`edgetune methods`: the tuning methods, their shape in each format, and their options, on standard output."""

from __future__ import annotations

import inspect
from typing import Any

from edgetune_export import backends

from .arguments import AsJson, print_json
from .tables import print_columns


def methods(*, as_json: AsJson = False) -> None:
    """List the tuning methods.

    Shows each method's shape in each format (low_rank, prefix, tensors or merged; - means not supported) and when to
    use it. --json adds the options.
    """
    from edgetune.methods import names

    described = {name: _described(name) for name in names()}
    if as_json:
        print_json(described)
        return
    rows = [
        (name, *(shape or "-" for shape in figures["backends"].values()), figures["about"])
        for name, figures in described.items()
    ]
    print_columns([("method", *backends.names(), ""), *rows])


def _described(name: str) -> dict[str, Any]:
    """A method as JSON values: description, shapes, shape in each backend (null: not supported) and options."""
    from edgetune.methods import load
    from edgetune.recipe.problems import other_names
    from edgetune.recipe.targets import supported_shapes

    method, shapes = load(name), supported_shapes(backends.names(), name)
    defaults = method.options()
    schema = method.options.model_json_schema(by_alias=False)["properties"]
    return {
        "about": inspect.cleandoc(type(method).__doc__ or "").splitlines()[0],
        "shapes": list(method.shapes(defaults)),
        "backends": {target: shapes.get(target) for target in backends.names()},
        "options": {
            key: {
                "default": value,
                "other_names": other_names(key, method.options),
                "description": schema[key].get("description", ""),
            }
            for key, value in defaults.model_dump(mode="json").items()
        },
    }
