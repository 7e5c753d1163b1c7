"""`edgetune compare RECIPE --task NAME --methods A,B --out DIR`: tables of several methods on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import printable

import edgetune

from .arguments import (
    AsJson,
    Quiet,
    RecipePath,
    RunsOn,
    Settings,
    Targets,
    data_option,
    names_of,
    output_option,
    print_json,
    settings_of,
    shown_unless,
    targets_of,
)
from .tables import print_table

if TYPE_CHECKING:
    from edgetune.comparison.columns import Column


def compare(
    recipe: RecipePath,
    *,
    task: Annotated[str, typer.Option(metavar="NAME", help="The recipe's adapter to compare the methods on.")],
    methods: Annotated[str, typer.Option(metavar="A,B", help="Methods, separated by commas.")],
    out: Annotated[Path, output_option(metavar="DIR", help="Folder for trials, tables and plots.")],
    ranks: Annotated[str | None, typer.Option(metavar="4,16", help="Ranks to try for methods with a rank.")] = None,
    targets: Targets = None,
    settings: Settings = None,
    data: Annotated[
        str | None, data_option(metavar="FILE", help="Rows to score on (default: the task's validation rows).")
    ] = None,
    limit: Annotated[int, data_option(min=1, metavar="N", help="Score at most N rows, spread evenly.")] = 100,
    rows: Annotated[
        str | None, data_option(metavar="30,100", help="Numbers of training rows to try (default: all rows).")
    ] = None,
    engine: RunsOn = "local",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on one task.

    Trains, exports and measures each method, also on the device's engines, and recommends one. With --rows 30,100,300,
    trains each on these numbers of rows and estimates what more rows would give. A --set key that begins with a
    method's name applies only to that method: --set lora.target_modules=q_proj, --set full.training.epochs=1. An
    interrupted comparison resumes where it stopped.
    """
    comparison = edgetune.compare(
        recipe,
        task,
        names_of(methods),
        out,
        ranks=_numbers("ranks", ranks),
        targets=None if targets is None else targets_of(targets),
        settings=settings_of(settings),
        data=data,
        limit=limit,
        rows=_numbers("rows", rows),
        engine=engine,
        on_progress=shown_unless(quiet),
    )
    if as_json:
        print_json(comparison.to_json())
    else:
        _print_tables(comparison, out)


def _numbers(option: str, joined: str | None) -> list[int]:
    try:
        return [] if joined is None else [int(text) for text in names_of(joined)]
    except ValueError as error:
        message = f"--{option}: {joined!r} is not a list of whole numbers"
        raise UsageError(message, f"write it as --{option} 4,16") from error


def _print_tables(comparison: edgetune.Comparison, out: Path) -> None:
    from edgetune.comparison.columns import (
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
    if comparison.metric:
        print(printable(f"scored by {comparison.metric} on {comparison.rows} rows of {comparison.source}"))
    chosen = comparison.recommended
    if chosen is not None:
        if chosen.undecided:
            print(f"no trial can be recommended by score: {chosen.undecided}")
        print(f"recommended: {chosen.reason}")
    for sentence in comparison.more_rows:
        print(sentence)
    print(out / "compare.html")


def _print_table(columns: Sequence[Column], rows: Iterable[tuple[str, ...]]) -> None:
    """Print the rows; a shorter one says at its end why the trial has no figures, and is a line below the table."""
    from edgetune.comparison.columns import TEXT_COLUMNS

    cells = list(rows)
    whole = [row for row in cells if len(row) == len(columns)]
    print_table([column.title for column in columns], whole, texts=TEXT_COLUMNS)
    reasons = [f"{', '.join(row[:-1])}: {row[-1]}\n" for row in cells if len(row) != len(columns)]
    if reasons:
        print("".join(reasons))
