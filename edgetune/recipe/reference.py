"""The recipe's models in, the text of docs/recipe.md out: every key with its default and meaning.

`python -m edgetune.recipe.reference > docs/recipe.md` writes it.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from edgetune_export import backends
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgetune import methods

from .model import Recipe
from .parts import AdapterSpec, Columns, DataSpec, DomainSpec, MethodSpec, OnnxSpec, Target, TextSpec, TrainingSpec
from .problems import other_names

INTRODUCTION = """\
# Recipe reference

A recipe is a YAML file: one base, its tasks and a board. `edgetune init` writes a commented one to begin with, and
`edgetune validate RECIPE` reports all problems of one with their lines. Any key can be set for one run with
`--set KEY=VALUE`, where a key is its path with dots, such as `--set adapters.command.method.r=8`. Paths are relative to
the recipe. `edgetune schema` prints the JSON schema, with which an editor completes and checks keys.

`edgetune validate` also says, without loading anything, what a build will need of this machine: memory for training
and export, and room on the disk of `--out` (by default `build/NAME`), beside what is free; `needs` in `--json`. It ends
with exit code 6 or 5, as a build does before any work, where the bundle cannot fit on the disk or the base's weights
not in memory, and says what would fit; where it may become tight it warns. Where memory is short, training makes its
forward passes smaller. What a base takes that must be downloaded first, the build alone can say. `--trial` trains ten
steps of the first adapter and says how long all trainings take; a build says so after its own first ten steps.

This page is made from the descriptions in `edgetune/recipe/` and `edgetune/methods/`.
"""
WORDS: dict[object, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    type(None): "`null`",
    tuple: "list of ",
    dict: "mapping of names to ",
    Annotated: "",
}


def reference() -> str:
    """The recipe reference in Markdown."""
    parts: list[tuple[str, type[BaseModel]]] = [
        ("Recipe", Recipe),
        ("`adapters.NAME`", AdapterSpec),
        ("`adapters.NAME.data`", DataSpec),
        ("`adapters.NAME.data.columns`", Columns),
        ("`training`, `adapters.NAME.training` and `domain.training`", TrainingSpec),
        ("`domain`", DomainSpec),
        ("`domain.data`", TextSpec),
        ("`onnx`", OnnxSpec),
    ]
    sections = [_section(title, model) for title, model in parts]
    for name in methods.names():
        sections.append(_section(f"`adapters.NAME.method`, `name: {name}`", methods.load(name).options))
    return INTRODUCTION + "".join(sections)


def _section(title: str, model: type[BaseModel]) -> str:
    rows = "\n".join(_rows(model))
    about = inspect.cleandoc(model.__doc__ or "")
    return f"\n## {title}\n\n{about}\n\n| key | values | default | meaning |\n| --- | --- | --- | --- |\n{rows}\n"


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for key, field in model.model_fields.items():
        names = ", ".join(f"`{name}`" for name in [key, *other_names(key, model)])
        meaning = " ".join((field.description or "").split())
        yield (
            "| "
            + " | ".join(
                text.replace("|", "\\|") for text in (names, _values(field.annotation), _default(field), meaning)
            )
            + " |"
        )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, TrainingSpec | OnnxSpec):
        return "those below"
    if isinstance(value, MethodSpec):
        return f"`{value.name}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(annotation: Any) -> str:  # noqa: ANN401 - what an annotation is has no type
    """An annotation in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Target:
        return ", ".join(f"`{name}`" for name in backends.names())
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_values(part) for part in parts)
    if origin in WORDS:
        return WORDS[origin] + _values(parts[1] if origin is dict else parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys, see below"
    return WORDS[annotation]


if __name__ == "__main__":
    print(reference(), end="")
