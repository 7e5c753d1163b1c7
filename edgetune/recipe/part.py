"""The base class of a recipe's own sections, and types of their fields."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints

from edgetune.common.section import Section

Text = Annotated[str, StringConstraints(min_length=1)]
Label = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A label without the spaces around it, as it is read from rows."""


def _section_of(value: object) -> object:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


S = TypeVar("S")
OrSwitch = Annotated[
    S | None,
    BeforeValidator(_section_of),
    Field(json_schema_extra=lambda schema: schema["anyOf"].append({"type": "boolean"})),
]
"""An optional section, which `true` turns on with all defaults."""


class RecipePart(Section):
    """Base class of the sections with a fixed place in a recipe; the text under a field is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True)
