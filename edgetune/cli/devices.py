"""`edgetune devices list | show NAME | fit TARGET --device NAME`: boards, and what fits on them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from edgetune_devices import boards, fit
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.formats.gguf_file import read_header

from edgetune import task_types

app = typer.Typer(help="Show boards, and what fits on them.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
BOARD = "The board: see `edgetune devices list`."
RamMib = Annotated[
    int | None,
    typer.Option("--ram-mib", metavar="N", min=1, help="The board's memory in MiB (default: the listed one)."),
]


@app.command("list")
def list_boards(*, as_json: AsJson = False) -> None:
    """List the boards."""
    found = [boards.load(name) for name in boards.names()]
    if as_json:
        _print_json([_summary(board) for board in found])
        return
    rows = [(b.name, b.title, f"{b.ram_free_mib} of {b.ram_mib} MiB", f"{b.bandwidth_gb_per_s:g} GB/s") for b in found]
    _print_columns(rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help=BOARD)],
    *,
    ram_mib: RamMib = None,
    as_json: AsJson = False,
) -> None:
    """Show all figures of a board, and where they come from."""
    board = _board(name, ram_mib)
    if as_json:
        _print_json(asdict(board))
        return
    figures = asdict(board)
    sources = figures.pop("sources")
    figures["instruction_sets"] = ", ".join(board.instruction_sets)
    _print_columns([(key, str(value)) for key, value in figures.items()])
    typer.echo("\nsources")
    _print_columns(list(sources.items()))


@app.command("fit")
def fit_target(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A bundle, a recipe or a .gguf file.")],
    *,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help=BOARD)],
    ram_mib: RamMib = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length", metavar="N", min=1, help="Context length in tokens (default: the target's own)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory and the speed of a bundle or recipe on a board."""
    board = _board(device, ram_mib)
    result = fit.fit(_needs(target, context_length), board)
    if as_json:
        _print_json(result.to_json())
    else:
        _print_columns(fit.table(result))


def _needs(target: Path, context_length: int | None) -> fit.Needs:
    if not target.exists():
        raise NotFoundError(f"no bundle, recipe or GGUF file {target}", "check the path")
    if target.is_dir() or target.name == MANIFEST_NAME:
        bundle = target if target.is_dir() else target.parent
        task_types.load(read_manifest(bundle).task).check_offers("fit", target)
        return fit.needs_of_bundle(bundle, context_length=context_length)
    if target.suffix == ".gguf":
        return fit.needs_of_header(read_header(target), context_length=context_length or fit.CONTEXT_LENGTHS[0])
    if target.suffix in (".yaml", ".yml"):
        return _needs_of_recipe(target, context_length)
    raise UsageError(
        f"{target} is not a bundle, recipe or GGUF file", "give a bundle's folder, a .yaml or a .gguf file"
    )


def _needs_of_recipe(path: Path, context_length: int | None) -> fit.Needs:
    from edgetune import bases, plan  # noqa: PLC0415 - the other commands need neither recipes nor bases
    from edgetune.recipe.model import load_recipe  # noqa: PLC0415 - as above

    recipe = load_recipe(path, {"context_length": context_length} if context_length else {})
    task_types.load(recipe.task).check_offers("fit", path)
    header = bases.describe(recipe)
    if header is None:
        message = f"the size of base {recipe.base!r} is not known before it is downloaded"
        raise NotFoundError(message, "build the recipe, or give a .gguf file or a local folder as the base")
    return plan.needs_of_recipe(recipe, header, bases.quantization_of(recipe))


def _board(name: str, ram_mib: int | None) -> boards.Board:
    board = boards.load(name)
    return board if ram_mib is None else board.with_ram(ram_mib)


def _summary(board: boards.Board) -> dict[str, Any]:
    figures = asdict(board)
    del figures["sources"], figures["storage"]
    return figures


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _print_columns(rows: list[Any]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
