"""Options that several commands share, and parsers for their values."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from edgetune_export import backends
from edgetune_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgetune.common.progress import OnProgress

# Options by the groups in --help.
recipe_option = partial(typer.Option, rich_help_panel="Recipe overrides")
base_option = partial(typer.Option, rich_help_panel="Base")
data_option = partial(typer.Option, rich_help_panel="Data")
engine_option = partial(typer.Option, rich_help_panel="Engine")
output_option = partial(typer.Option, rich_help_panel="Output")

BOARD = "The board: see `edgetune devices list`; or a board file, such as one of `edgetune devices detect`."

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    recipe_option("--set", metavar="KEY=VALUE", help="Set a key of the recipe, such as training.epochs=1; repeatable."),
]
AsJson = Annotated[bool, output_option("--json", help="Print JSON as the last line of standard output.")]
Quiet = Annotated[bool, output_option("--quiet", help="Print no progress.")]
Out = Annotated[Path | None, output_option(metavar="OUT", help="The bundle's folder (default: build/NAME).")]
Into = Annotated[
    Path | None,
    output_option(metavar="BUNDLE", help="Add the adapters to this bundle, or replace those of the same names."),
]
Engine = Annotated[str | None, engine_option(metavar="NAME", help="gguf or onnx (default: the bundle's first format).")]
RunsOn = Annotated[
    str, engine_option("--engine", metavar="NAME", help="Where to train: local, or ray for a Ray cluster.")
]
ContextLength = Annotated[
    int | None, engine_option(metavar="N", min=1, help="Context length in tokens (default: the bundle's).")
]
Kv = Annotated[
    str | None,
    engine_option(metavar="TYPE", help="Data type of keys and values, as for `edgetune-run`: q8_0 halves them."),
]


def finite_mb(size_mb: float | None) -> float | None:
    """The size of an option, as its callback; BadParameter for inf and nan."""
    if size_mb is not None and not math.isfinite(size_mb):
        raise typer.BadParameter(f"{size_mb} is not a finite number; give a number of MB.")
    return size_mb


CacheMb = Annotated[
    float | None,
    engine_option(metavar="N", min=0, callback=finite_mb, help="Memory for saved states, as for `edgetune-run`."),
]
AdaptersMb = Annotated[
    float | None,
    engine_option(metavar="N", min=0, callback=finite_mb, help="Memory for loaded adapters, as for `edgetune-run`."),
]
Targets = Annotated[str | None, recipe_option(metavar="A,B", help="Formats to write, such as gguf,onnx.")]


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
        key, separator, value = text.partition("=")
        if not key or not separator:
            raise UsageError(f"{flag} {text!r} is not of the form {form}", f"write {flag} {form}")
        if key in pairs:
            raise UsageError(f"{flag}: {key!r} is set twice", "keep one")
        pairs[key] = value
    return pairs


def refuse_given(options: Mapping[str, object], when: str, remedy: str) -> None:
    """UsageError if one of the options, by their flags, is given, as it does nothing `when`."""
    given = [flag for flag, value in options.items() if value is not None and value is not False]
    if given:
        raise UsageError(f"{given[0]} does nothing {when}", remedy)


def check_not_read(out: Path, read: Iterable[str | Path], *bundles: Path) -> None:
    """UsageError if `out` is a folder, is inside one of the bundles, or is one of the files that the command reads."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "give the name of a file")
    written = out.resolve()
    if any(written == Path(file).resolve() for file in read):
        raise UsageError(f"{out} is a file that this command reads", "write to another file")
    for bundle in bundles:
        if bundle.resolve() in written.parents:
            raise UsageError(f"{out} is inside the bundle {bundle}", "give a file beside it")


def check_page(page: Path, *bundles: Path) -> None:
    """UsageError for a page that is no .html file, so that it replaces no file that is read, or is in a bundle.

    The bundles are those that the command reads or writes.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{page} is not an .html file, and pages are written as HTML", "name it .html")
    check_not_read(page, (), *bundles)


def check_rows_file(out: Path, read: Iterable[str | Path]) -> None:
    """UsageError for a file that rows cannot be written to: one that the command reads, or a table."""
    from edgetune.tasks.row_files import JSONL_SUFFIXES

    check_not_read(out, read)
    if out.suffix.lower() not in JSONL_SUFFIXES:
        raise UsageError(f"{out} is not a .jsonl file, and rows are written as JSON lines", "name it .jsonl")


def print_json(values: Mapping[str, Any] | Sequence[Any], indent: int | None = None) -> None:
    """Print the values as JSON, on one line without `indent`; all of it, whatever the terminal's encoding."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(values, indent=indent, ensure_ascii=not is_unicode))
