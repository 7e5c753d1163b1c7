"""`edgetune compare RECIPE --task NAME --methods A,B --out DIR`: tables of several methods on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError

from .arguments import (
    DATA_PANEL,
    ENGINE_PANEL,
    OUTPUT_PANEL,
    AsJson,
    Quiet,
    RecipePath,
    Settings,
    Targets,
    names_of,
    print_json,
    settings_of,
    targets_of,
)

if TYPE_CHECKING:
    from edgetune.comparison.columns import Column
    from edgetune.comparison.comparison import Comparison
    from edgetune.comparison.sweep import Run

ENGINES = ("local", "ray")
# Width for the widest table, in characters, without a terminal.
WIDTH = 140


def compare(
    recipe: RecipePath,
    *,
    task: Annotated[str, typer.Option(metavar="NAME", help="The recipe's adapter to compare the methods on.")],
    methods: Annotated[str, typer.Option(metavar="A,B", help="Methods, separated by commas.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for trials, tables and plots.", rich_help_panel=OUTPUT_PANEL)
    ],
    ranks: Annotated[str | None, typer.Option(metavar="4,16", help="Ranks to try for methods with a rank.")] = None,
    targets: Targets = None,
    settings: Settings = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows to score on (default: the task's validation rows).",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Score at most N rows, spread evenly.", rich_help_panel=DATA_PANEL),
    ] = 100,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Where trials run: local, or ray for a Ray cluster.", rich_help_panel=ENGINE_PANEL
        ),
    ] = ENGINES[0],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on one task.

    Trains, exports and measures each method, also on the device's engines, and recommends one. A --set key that begins
    with a method's name applies only to that method: --set lora.target_modules=q_proj, --set full.training.epochs=1.
    An interrupted comparison resumes where it stopped.
    """
    from edgetune.comparison import sweep  # noqa: PLC0415 - help needs none of it
    from edgetune.comparison.grid import Request  # noqa: PLC0415
    from edgetune.progress import Progress  # noqa: PLC0415

    request = Request(
        recipe=recipe,
        task=task,
        methods=names_of(methods),
        out=out,
        ranks=_ranks(ranks),
        targets=None if targets is None else targets_of(targets),
        settings=settings_of(settings),
        data=data,
        rows=rows,
    )
    comparison = sweep.compare(request, _run(engine), Progress(quiet=quiet))
    if as_json:
        print_json(comparison.to_json())
    else:
        _print_tables(comparison, out)


def _ranks(joined: str | None) -> list[int]:
    try:
        return [] if joined is None else [int(text) for text in names_of(joined)]
    except ValueError as error:
        raise UsageError(f"--ranks: {joined!r} is not a list of whole numbers", "write it as --ranks 4,16") from error


def _run(engine: str) -> Run:
    if engine not in ENGINES:
        raise UsageError(f"--engine: no engine {engine!r}", f"choose one of: {', '.join(ENGINES)}")
    if engine == "ray":
        from edgetune.comparison.ray_engine import run_on_ray  # noqa: PLC0415 - needs the extra ray

        return run_on_ray
    from edgetune.comparison.process import run_here  # noqa: PLC0415 - help needs none of it

    return run_here


def _print_tables(comparison: Comparison, out: Path) -> None:
    from edgetune.comparison.columns import (  # noqa: PLC0415 - as above
        ON_ENGINE,
        PLACEMENTS,
        TRAINING,
        busy_notes,
        engine_rows,
        placement_rows,
        training_rows,
    )

    _print_table(TRAINING, training_rows(comparison.outcomes))
    _print_table(ON_ENGINE, engine_rows(comparison.outcomes))
    placements = list(placement_rows(comparison.outcomes))
    if placements:
        _print_table(PLACEMENTS, placements)
    for note in busy_notes(comparison.outcomes):
        print(note)
    chosen = comparison.recommended
    if chosen is not None:
        if chosen.undecided:
            print(f"no trial can be recommended by score: {chosen.undecided}")
        print(f"recommended: {chosen.reason}")
    print(out / "compare.html")


def _print_table(columns: Sequence[Column], rows: Iterable[tuple[str, ...]]) -> None:
    from rich import box  # noqa: PLC0415 - help needs no rich
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from edgetune.comparison.columns import TEXT_COLUMNS  # noqa: PLC0415

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.title in TEXT_COLUMNS else "right")
    reasons = []
    for row in rows:
        if len(row) == len(columns):
            table.add_row(*row)
        else:
            reasons.append(row)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    console.print(table)
    for row in reasons:
        print(f"{', '.join(row[:-1])}: {row[-1]}")
    if reasons:
        print()
