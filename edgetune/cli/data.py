"""`edgetune data check` and `preview`: problems with the rows of a recipe, and the copies that its training adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import printable, shortened

from .arguments import (
    AsJson,
    Quiet,
    RecipePath,
    Settings,
    check_page,
    check_rows_file,
    data_option,
    output_option,
    pairs_of,
    print_json,
    settings_of,
)
from .grouped_help import GroupedCommand

if TYPE_CHECKING:
    from edgetune.curation.checking.findings import Finding, TaskCheck
    from edgetune.tasks.data import TaskRow
    from edgetune.tasks.task import Task

app = typer.Typer(help="Check the rows of a recipe, and show changed copies of them.", no_args_is_help=True)

SHOWN = 3
"""Problems of each kind that are printed."""

Adapter = Annotated[str | None, data_option("--adapter", metavar="NAME", help="Only the rows of this adapter.")]


@app.command(cls=GroupedCommand)
def check(
    recipe: RecipePath,
    *,
    adapter: Adapter = None,
    test: Annotated[
        list[str] | None,
        data_option(
            "--test",
            metavar="NAME=FILE",
            help="Test rows of an adapter (default: NAME-test beside its training file); repeatable.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        data_option(
            metavar="N",
            min=1,
            help="Train for N minutes per adapter to find wrong answers (default: its data's check_minutes).",
        ),
    ] = None,
    out: Annotated[
        Path | None, output_option(metavar="FILE", help="Write the training rows without the bad ones, as .jsonl.")
    ] = None,
    weights: Annotated[
        bool,
        output_option("--weights", help="Keep rows with a doubtful answer in --out, with a low weight in training."),
    ] = False,
    page: Annotated[
        Path | None, output_option(metavar="FILE", help="Write an HTML page with pictures and the rows.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find rows that repeat, contradict each other, break the output, or have a wrong answer.

    Compares the rows of all splits: those to train on, for validation, for the confidence, and kept apart for a test.
    With --minutes, or `check_minutes` in an adapter's data, adapters are trained on parts of the rows, and rows are
    ranked by how unlikely their answers are to those that have not seen them. --out leaves out rows that cannot be
    used, repeat, are in another file too, or probably have a wrong answer.
    """
    from edgetune.common.files import write_file
    from edgetune.common.progress import Progress
    from edgetune.curation.checking.check import check as run
    from edgetune.curation.checking.check import files_read
    from edgetune.curation.checking.clean import STAY, write_clean
    from edgetune.curation.checking.findings import KINDS
    from edgetune.curation.checking.page import page_of
    from edgetune.recipe.model import Recipe

    loaded = Recipe.from_file(recipe, settings_of(settings))
    if out is not None and adapter is None and len(loaded.adapters) > 1:
        raise UsageError("--out is for the rows of one adapter", f"add --adapter {next(iter(loaded.adapters))}")
    in_recipe = [spec.data.check_minutes for name, spec in loaded.adapters.items() if adapter in (None, name)]
    if weights and (out is None or not any((minutes, *in_recipe))):
        raise UsageError("--weights needs an estimate of wrong answers, and a file", "add --minutes N --out FILE")
    tests = pairs_of(test or (), "--test", "NAME=FILE")
    if out is not None:
        check_rows_file(out, files_read(loaded, tests))
    if page is not None:
        check_page(page)
    checks = run(loaded, adapter=adapter, tests=tests, minutes=minutes, progress=Progress(quiet=quiet))
    if page is not None:
        write_file(page, page_of(loaded.name, checks))
    data = loaded.adapters[checks[0].name].data
    left_out = {} if out is None else write_clean(checks[0], data, out, weighted=weights)
    if as_json:
        print_json({check.name: check.to_json() for check in checks})
        return
    for check in checks:
        _print_check(check)
    if out is not None:
        stay = "".join(f"; to be corrected: {KINDS[kind]}" for kind in STAY if kind in checks[0].counts)
        print(f"{out}: rows left out: {sum(left_out.values())}{stay}")
    if page is not None:
        print(page)


@app.command(cls=GroupedCommand)
def preview(
    recipe: RecipePath,
    *,
    adapter: Adapter = None,
    rows: Annotated[int, data_option(min=1, metavar="N", help="Show the copies of N rows, spread evenly.")] = 5,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show the changed copies of rows that `data.augment` adds to a training.

    Prints rows with their copies and what was changed, as a build makes them. --json prints all.
    """
    from edgetune.recipe.model import Recipe
    from edgetune.tasks.task import read_task

    loaded = Recipe.from_file(recipe, settings_of(settings))
    if adapter is not None:
        loaded.check_adapter(adapter)
    chosen = [name for name in loaded.adapters if adapter in (None, name)]
    tasks = [read_task(name, loaded) for name in chosen if loaded.adapters[name].data.augment is not None]
    if not tasks:
        raise UsageError(f"the recipe has no data.augment for {', '.join(chosen)}", "add `augment: true` to its data")
    if as_json:
        print_json({task.name: [copied.to_json() for copied in task.copies] for task in tasks})
        return
    for task in tasks:
        _print_copies(task, rows)


def _print_copies(task: Task, count: int) -> None:
    from edgetune.common.spread import spread

    print(f"{task.name}: {len(task.copies)} rows are added to {len(task.train)}")
    copies = [copied for copied in task.copies if not copied.is_negative]
    for source in spread(list({id(copied.source): copied.source for copied in copies}.values()), count):
        print(printable(f"  {source.where}"))
        print(f"    {_shown(source)}")
        for copied in copies:
            if copied.source is source:
                print(f"    {_shown(copied.row)}  ({printable(', '.join(copied.changes))})")
    if negatives := [copied.row for copied in task.copies if copied.is_negative]:
        print(f"  negatives: {len(negatives)}")
        for row in spread(negatives, count):
            print(f"    {_shown(row)}")


def _shown(row: TaskRow) -> str:
    """The prompt and the answer; of a conversation, each answer after the message before it."""
    return ", ".join(
        f"{shortened(each.prompt, 100)!r} → {shortened(each.completion or '', 120)}" for each in row.answers
    )


def _print_check(check: TaskCheck) -> None:
    from edgetune.curation.checking.findings import KINDS

    rows = ", ".join(f"{count} {split}" for split, count in check.rows.items() if count)
    tokens = sorted(check.tokens)
    about = "about " * check.is_estimated
    lengths = f"{about}{tokens[0]} to {tokens[-1]} tokens, half of them at most {tokens[len(tokens) // 2]}"
    print(printable(f"{check.name}: {rows} rows of {lengths}"))
    if check.estimate is not None:
        print(f"  {check.estimate.summary}")
    for kind, count in check.counts.items():
        print(f"  {KINDS[kind]}: {count}")
        for finding in check.of_kind(kind)[:SHOWN]:
            print(f"    {_line(finding)}")
        if count > SHOWN:
            print(f"    and {count - SHOWN} more: see --page or --json")


def _line(finding: Finding) -> str:
    places = ", ".join(Path(where).name for where in finding.where[:SHOWN])
    more = len(finding.where) - SHOWN
    parts = [f"{places} and {more} more" if more > 0 else places, finding.remark]
    if finding.prompts:
        parts.append(f"{finding.prompts[0]!r} → {' | '.join(dict.fromkeys(finding.answers))}")
    if finding.own is not None:
        parts.append(f"the model: {finding.own}")
    return shortened("; ".join(filter(None, parts)), 200)
