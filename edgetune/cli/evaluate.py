"""`edgetune evaluate BUNDLE --data FILE`: an adapter's score and wrong answers on standard output."""

from __future__ import annotations

from typing import Annotated

import typer
from edgetune_runtime.wording import shortened

import edgetune

from .arguments import AsJson, BundlePath, Engine, Kv, Quiet, data_option, output_option, print_json, shown_unless


def evaluate(
    bundle: BundlePath,
    *,
    data: Annotated[
        str, data_option(metavar="FILE", help="Rows in the form of the training data: .jsonl, .csv, .tsv or a hub id.")
    ],
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="The adapter to score (default: the base without one).")
    ] = None,
    limit: Annotated[int | None, data_option(min=1, metavar="N", help="Score at most N rows, spread evenly.")] = None,
    show: Annotated[int, output_option(min=0, metavar="N", help="Show up to N wrong answers; not with --json.")] = 3,
    engine: Engine = None,
    kv: Kv = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a bundle's adapter on data.

    The runtime answers the rows, and each turn of a conversation, as on the board;
    the answers are scored with the metric of the adapter's task.
    """
    on_progress = shown_unless(quiet)
    result = edgetune.evaluate(bundle, data, adapter, limit=limit, engine=engine, kv=kv, on_progress=on_progress)
    if as_json:
        print_json(result.to_json())
    else:
        _print_evaluation(result, show)


def _print_evaluation(result: edgetune.Evaluation, show: int) -> None:
    left_out = f", {result.too_long} more too long" if result.too_long else ""
    print(f"{result.metric} {result.score:.4g} on {result.rows} rows{left_out}")
    wrong = [] if result.metric == "perplexity" else [row for row in result.details if row.score < 1]
    for row in sorted(wrong, key=lambda row: row.score)[:show]:
        print(f"\n{row.where}: score {row.score:.2f}")
        for name, text in (("prompt", row.prompt), ("expected", row.reference), ("answered", row.answer)):
            print(f"  {name:<10}{shortened(text)}")
