"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from edgetune_devices import boards
from edgetune_runtime.formats.quantization import QUANTIZATIONS

from .model import Recipe
from .problems import AUTO
from .task_files import FROM

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe, for editors; it lists all boards and quantizations."""
    schema = {"$schema": _DIALECT, **Recipe.model_json_schema()}
    quantizations = schema["properties"]["quantization"]["anyOf"]
    quantizations[0]["enum"] = sorted(QUANTIZATIONS)
    quantizations += [{"type": "string", "pattern": r"^[a-z0-9_]+\+[a-z0-9_]+$"}, {"const": AUTO}]
    schema["properties"]["device"]["anyOf"][0]["enum"] = boards.names_with_sizes()
    adapters, pattern = schema["properties"]["adapters"], {"type": "string", "minLength": 1}
    ((name, adapter),) = adapters["patternProperties"].items()
    adapters["patternProperties"] = {name.replace("^", f"^(?!{FROM}$)", 1): adapter}
    adapters["properties"] = {FROM: {"anyOf": [pattern, {"type": "array", "items": pattern}, adapter]}}
    return schema
