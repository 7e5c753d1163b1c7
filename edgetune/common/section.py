"""The base class of the sections of a recipe, but for those of formats and of `output`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from edgetune_runtime.text.json_text import leaves
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of a recipe: frozen, without unknown keys, infinity and NaN, and without true and false in place of
    numbers, which pydantic reads as 1 and 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: object, info: ValidationInfo) -> object:
        types = set(_types_in(cls.model_fields[str(info.field_name)].annotation))
        if types & {int, float} and bool not in types:
            for boolean in (leaf for leaf in leaves(value) if isinstance(leaf, bool)):
                said = "is neither a text nor a number; put it in quotes" if str in types else "is not a number"
                raise ValueError(f"{str(boolean).lower()} {said}")
        return value


def _types_in(annotation: Any) -> Iterator[object]:  # noqa: ANN401 - a type or any form of typing
    """The types that the values of an annotation are composed of."""
    yield annotation
    arguments = get_args(annotation)
    for argument in arguments[1:] if get_origin(annotation) is dict else arguments:
        yield from _types_in(argument)
