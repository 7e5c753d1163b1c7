"""Generate docs/recipe.md, which lists every key of a recipe with its values, default and meaning.

`python -m edgetune.recipe.reference > docs/recipe.md` writes it.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from edgetune_export import backends
from edgetune_export.backends.format import FormatOptions
from edgetune_export.backends.onnx.options import OnnxOptions
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgetune import methods

from .data import AugmentSpec, Columns, DataSpec, NegativesSpec, TextSpec
from .model import Recipe
from .output import OutputOption
from .parts import AdapterSpec, DomainSpec, MethodSpec, OutOfScopeSpec, QuantizationSpec, Target
from .problems import other_names
from .routing import RouteSpec
from .training import TrainingSpec

INTRODUCTION = """\
# Recipe reference

A recipe is a YAML file that describes one base, its tasks and a board. `edgetune init --data FILE` writes one for your
rows, and `edgetune plan RECIPE` reports all problems of a recipe with their lines. `--set KEY=VALUE`
overrides any key for one run; KEY is the key's path with dots, as in `--set adapters.command.method.r=8`. Paths are
relative to the recipe. `edgetune schema` prints a JSON schema, which lets an editor complete and check keys.

`edgetune plan` also reports, without loading the model, what a build will do and need: the base's conversion, each
adapter's modules, shapes and sizes, the speed on the board, the memory for training and export and the disk space at
`--out` (by default `build/NAME`), and what is free on this machine. It ends with exit code 6 if the bundle does not fit
on the disk and with 5 if the base's weights do not fit in memory, and says what would fit; a build makes the same
checks before any work. If space is tight, it warns. If memory is short, training uses smaller forward passes. For a
base that is not downloaded yet, the plan has what is known without it, and the build completes it after the download.
`--trial` trains ten steps of the first adapter and estimates the time of training all adapters; a build
reports the same estimate after its first ten steps.

This page is generated from the descriptions in `edgetune/recipe/`, `edgetune/methods/` and `edgetune_export/backends/`.
"""
WORDS: dict[object, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    Any: "any",
    type(None): "`null`",
    tuple: "list of ",
    dict: "mapping of names to ",
    Annotated: "",
}
PLURALS = {"string": "strings", "integer": "integers", "number": "numbers"}


def reference() -> str:
    """The recipe reference in Markdown."""
    parts: list[tuple[str, type[BaseModel]]] = [
        ("Recipe", Recipe),
        ("`quantization`", QuantizationSpec),
        ("`adapters.NAME`", AdapterSpec),
        ("`adapters.NAME.data`", DataSpec),
        ("`adapters.NAME.data.columns`", Columns),
        ("`adapters.NAME.data.augment`", AugmentSpec),
        ("`adapters.NAME.data.augment.negatives`", NegativesSpec),
        ("`adapters.NAME.out_of_scope`", OutOfScopeSpec),
        ("`training`, `adapters.NAME.training` and `domain.training`", TrainingSpec),
        ("`domain`", DomainSpec),
        ("`domain.data`", TextSpec),
        ("`route`", RouteSpec),
        ("`onnx`", OnnxOptions),
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
    if isinstance(value, TrainingSpec | FormatOptions):
        return "see below"
    if isinstance(value, MethodSpec):
        return f"`{value.name}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(annotation: Any) -> str:  # noqa: ANN401 - annotations have no common type
    """A type annotation in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Target:
        return ", ".join(f"`{name}`" for name in backends.names())
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_values(part) for part in parts)
    if origin in WORDS:
        inner = _values(parts[1] if origin is dict else parts[0])
        return WORDS[origin] + (inner if origin is Annotated else PLURALS.get(inner, inner))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = "keys" if annotation is OutputOption else "keys, see below"
        return f"`auto`, {keys}" if annotation in (OutputOption, TrainingSpec) else keys
    return WORDS[annotation]


if __name__ == "__main__":
    print(reference(), end="")
