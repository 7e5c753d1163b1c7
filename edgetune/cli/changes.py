"""Prints what changed between two bundles: the scores of both, and some answers that differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune_runtime.wording import printable, shortened

from .tables import print_table

if TYPE_CHECKING:
    from edgetune.retraining.learning.change import Changes

_SHOWN = 3


def print_changes(changes: Changes) -> None:
    """A table of the scores and times per row, and below it some changed answers of each set of rows."""
    rows, lines = [], []
    for name, sets in changes.items():
        for kind, change in sets.items():
            scores = change.text(change.before), change.text(change.after), change.difference
            times = (f"{ms:.0f}" for ms in (change.before_ms, change.after_ms))
            rows.append([name, kind, str(change.rows), *scores, *times])
            if change.left_out:
                lines.append(f"{name}: {change.left_out} more {kind} rows do not fit in the context of one bundle")
            for answer in change.answers[:_SHOWN]:
                lines.append(f"{name}: {shortened(answer.prompt)}")
                lines += [
                    f"  {field:<10}{shortened(getattr(answer, field))}" for field in ("expected", "before", "after")
                ]
    titles = ("adapter", "rows", "number", "before", "after", "difference", "ms per row before", "after")
    print_table(titles, rows, texts=titles[:2])
    for line in lines:
        print(printable(line))
