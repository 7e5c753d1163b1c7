"""Options that several commands share, and parsers for their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from edgetune_export import backends
from edgetune_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgetune.progress import OnProgress

# Titles of the option groups in --help.
RECIPE_PANEL = "Recipe overrides"
BASE_PANEL = "Base"
DATA_PANEL = "Data"
ENGINE_PANEL = "Engine"
OUTPUT_PANEL = "Output"

BOARD = "The board: see `edgetune devices list`; or a board file, such as one of `edgetune devices detect`."

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key of the recipe, such as training.epochs=1; repeatable.",
        rich_help_panel=RECIPE_PANEL,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object as the last line of standard output.", rich_help_panel=OUTPUT_PANEL
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress.", rich_help_panel=OUTPUT_PANEL)]
Out = Annotated[
    Path | None,
    typer.Option(metavar="OUT", help="The bundle's folder (default: build/NAME).", rich_help_panel=OUTPUT_PANEL),
]
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="gguf or onnx (default: the bundle's first format).", rich_help_panel=ENGINE_PANEL
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Context length in tokens (default: the bundle's).", rich_help_panel=ENGINE_PANEL
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Data type of keys and values, as for `edgetune-run`: q8_0 halves them.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
CacheMb = Annotated[
    float | None,
    typer.Option(
        metavar="N", min=0, help="Memory for saved states, as for `edgetune-run`.", rich_help_panel=ENGINE_PANEL
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Formats to write, such as gguf,onnx.", rich_help_panel=RECIPE_PANEL),
]


def shown_unless(quiet: bool) -> OnProgress | None:
    """What gets the progress of a command: nothing with --quiet, otherwise standard error."""
    return (lambda _: None) if quiet else None


def names_of(joined: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in joined.split(",")]


def targets_of(joined: str) -> list[str]:
    """The formats of --targets, each once; UsageError for an unknown one."""
    names = list(dict.fromkeys(names_of(joined)))
    for name in names:
        error = backends.unknown(name)
        if error is not None:
            raise UsageError(f"--targets: {error.message}", error.remedy)
    return names


def settings_of(settings: Sequence[str] | None) -> dict[str, str]:
    """Recipe keys and values from --set."""
    return pairs_of(settings or (), "--set", "KEY=VALUE")


def pairs_of(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Key and value of each text, split at its first =; UsageError if there is none, or a key is repeated."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, given, value = text.partition("=")
        if not key or not given:
            raise UsageError(f"{flag} {text!r} is not of the form {form}", f"write {flag} {form}")
        if key in pairs:
            raise UsageError(f"{flag}: {key!r} is set twice", "keep one")
        pairs[key] = value
    return pairs


def print_json(values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print the values as one line of JSON."""
    print(json.dumps(values, ensure_ascii=False))
