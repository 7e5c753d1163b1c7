"""`edgetune devices list | show | fit | detect`: boards, what fits on them, and the board file of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from edgetune_devices import boards, changes, detect, fit
from edgetune_runtime import engines
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.sizing.calibration import read_calibration
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.options import with_options

from .arguments import BOARD, AdaptersMb, AsJson, CacheMb, ContextLength, Engine, Kv, finite_mb, print_json
from .grouped_help import GroupedCommand
from .tables import print_columns

app = typer.Typer(help="Show boards, and what fits on them.", no_args_is_help=True)

RamMib = Annotated[
    int | None,
    typer.Option("--ram-mib", metavar="N", min=1, help="The board's memory in MiB (default: the listed one)."),
]


@app.command("list", cls=GroupedCommand)
def list_boards(*, as_json: AsJson = False) -> None:
    """List the boards.

    Boards sold with several memory sizes also have one name per size, such as pi-4-2gb.
    """
    listed = [boards.load(name) for name in boards.names()]
    if as_json:
        print_json([_summary(board) for board in listed])
        return
    rows = [
        (b.name, b.title, f"{b.ram_free_mib} of {b.ram_mib} MiB", f"{b.bandwidth_gb_per_s:g} GB/s", _sizes(b))
        for b in listed
    ]
    print_columns(rows)


@app.command(cls=GroupedCommand)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help=BOARD)],
    *,
    ram_mib: RamMib = None,
    as_json: AsJson = False,
) -> None:
    """Show all figures of a board, and where they come from."""
    board = _board(name, ram_mib)
    if as_json:
        print_json(asdict(board))
        return
    figures = asdict(board)
    sources = figures.pop("sources")
    figures["instruction_sets"] = ", ".join(board.instruction_sets)
    free = board.ram_free_by_size_mib
    figures["ram_free_by_size_mib"] = ", ".join(f"{free[size]} of {size}" for size in free) or "as for ram_mib"
    figures["ram_sizes_mib"] = ", ".join(map(str, board.ram_sizes_mib)) or "one size"
    print_columns([(key, str(value)) for key, value in figures.items()])
    print("\nsources")
    print_columns(list(sources.items()))


@app.command("fit", cls=GroupedCommand)
def fit_target(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A bundle, a recipe or a .gguf file.")],
    *,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help=BOARD)],
    ram_mib: RamMib = None,
    engine: Engine = None,
    context_length: ContextLength = None,
    kv: Kv = None,
    cache_mb: CacheMb = None,
    adapters_mb: AdaptersMb = None,
    serve: Annotated[bool, typer.Option("--serve", help="Also count the memory of `edgetune-run serve`.")] = False,
    limit_mb: Annotated[
        float | None,
        typer.Option(
            "--limit-mb",
            metavar="N",
            min=1,
            callback=finite_mb,
            help="Memory limit of a container or a systemd unit in MB.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Speed measured by `edgetune-run doctor --calibrate FILE`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory and the speed of a bundle or recipe on a board, and what to change if it does not fit."""
    from edgetune.building.fit_target import read_target

    with_needs = engines.names_with_needs()
    if engine is not None and engine not in with_needs:
        raise UsageError(f"no engine {engine!r}", f"choose one of: {', '.join(with_needs)}")
    board = _board(device, ram_mib)
    read = read_target(target, context_length, engine)
    with_limits = partial(with_options, cache_mb=cache_mb, adapters_mb=adapters_mb, serves=serve)
    needs = with_limits(read.needs, kv=kv)
    other = None if read.other is None else with_limits(read.other)
    figures = None if calibration is None else _calibrated(calibration, needs, other)
    if figures is not None:
        board = replace(board, **asdict(figures[needs.engine]))
    result = fit.fit(needs, board if limit_mb is None else board.limited(limit_mb))
    proposed = changes.changes_for(needs, board, header=read.header, other=other, limit_mb=limit_mb, figures=figures)
    if as_json:
        print_json(result.to_json() | {"changes": [change.to_json() for change in proposed]})
        return
    print_columns(fit.table(result))
    if proposed:
        print("\nto change, the cheapest first; each with those above it")
        print_columns([_row(change) for change in proposed])


@app.command("detect", cls=GroupedCommand)
def detect_board(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the board file here (default: print it).")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="DIR", help="Measure the speed with this bundle, which is more precise."),
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", metavar="NAME", help="With --bundle: gguf or onnx.")] = None,
) -> None:
    """Write a board file for this machine: its processor, its memory within the limits of containers, its speed."""
    if out is not None and out.suffix != ".toml":
        raise UsageError(f"{out} is not a .toml file", "give a name that ends in .toml; it is the name of the board")
    text = detect.board_file(bundle, engine)
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}; use it with: edgetune devices fit TARGET --device {out}")


def _calibrated(path: Path, needs: Needs, other: Needs | None) -> Mapping[str, SpeedFigures]:
    """The figures of a calibration by engine; those of the other engine only if it has them."""
    measured = read_calibration(path, needs)
    if caution := measured.caution(needs):
        typer.echo(f"note: {caution}", err=True)
    figures = {needs.engine: measured.figures}
    if other is not None:
        with suppress(NotFoundError):
            figures[other.engine] = read_calibration(path, other).figures
    return figures


def _board(name: str, ram_mib: int | None) -> boards.Board:
    board = boards.find(name)
    return board if ram_mib is None else board.with_ram(ram_mib)


def _summary(board: boards.Board) -> dict[str, Any]:
    figures = asdict(board)
    del figures["sources"], figures["storage"]
    return figures


def _sizes(board: boards.Board) -> str:
    return ", ".join(f"{size // 1024}" for size in board.ram_sizes_mib) + (" GB" if board.ram_sizes_mib else "")


def _row(change: changes.Change) -> tuple[str, ...]:
    return (
        change.what,
        f"-{change.saves_mb:.0f} MB" if change.saves_mb else "",
        f"needs {change.needed_mb:.0f} MB",
        "" if change.adapter_tokens_per_s is None else f"{change.adapter_tokens_per_s:.1f} tokens/s",
        "fits" if change.fits else "",
        f"({change.cost})",
    )
