"""The `output` key of an adapter: which answers it may give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune_runtime.decoding.output import KINDS, SPACINGS, OutputSpec, output_of
from edgetune_runtime.errors import EdgetuneError
from pydantic import BaseModel, ConfigDict, ValidationInfo, model_serializer, model_validator

from edgetune.common.files import expanded

AUTO = "auto"

_REMEDY = f"write auto, or a mapping with one of {', '.join(KINDS)}"


class OutputOption(BaseModel):
    """An output constraint, written as `auto` or as a mapping with one of schema, choices, regex and grammar."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stored: dict[str, Any] | None
    """What the manifest stores of the constraint; None for auto."""

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, cls):
            return value
        if value == AUTO:
            return {"stored": None}
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not an output constraint; {_REMEDY}")
        folder: Path = (info.context or {}).get("folder", Path())
        constraint: dict[str, Any] = {key: _read(key, content, folder) for key, content in value.items()}
        unknown = sorted(constraint.keys() - {*KINDS, "spacing"}, key=str)
        if unknown:
            raise ValueError(f"there is no key {unknown[0]!r} here; {_REMEDY}")
        try:
            return {"stored": output_of(**constraint).to_json()}
        except EdgetuneError as error:
            raise ValueError(f"{error.message}; {error.remedy}") from error

    @property
    def is_auto(self) -> bool:
        """Whether the constraint is inferred from the training and validation rows."""
        return self.stored is None

    @property
    def spec(self) -> OutputSpec | None:
        """The constraint; None for auto."""
        return None if self.stored is None else OutputSpec.from_json(self.stored)

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return AUTO if self.stored is None else self.stored

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: object, _handler: object) -> dict[str, Any]:
        kinds: dict[str, Any] = {
            "schema": {"type": ["object", "string"], "description": "a JSON schema, or a file with one"},
            "choices": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "regex": {"type": "string"},
            "grammar": {"type": "string", "description": "a Lark grammar as llguidance reads it, or a .lark file"},
            "spacing": {"enum": list(SPACINGS)},
        }
        options = {"type": "object", "properties": kinds, "additionalProperties": False}
        return {"title": "Output", "description": cls.__doc__, "oneOf": [{"const": AUTO}, options]}


def _read(key: str, content: object, folder: Path) -> object:
    """The content of a file for the name of one."""
    is_file = isinstance(content, str) and (
        key == "schema" or (key == "grammar" and content.strip().endswith(".lark") and "\n" not in content.strip())
    )
    if not is_file:
        return content
    path = folder / expanded(str(content).strip())
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if key == "schema" else text
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}; give the path of a {key}, relative to the recipe") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; give a {key} file") from error
