"""Prints tables on standard output: ruled ones with titles, and plain columns."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from edgetune_runtime.wording import printable

WIDTH = 140
"""Characters without a terminal, so that the widest table is not wrapped."""


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Collection[str]) -> None:
    """Print rows below their titles; the columns in `texts` are aligned to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in texts else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(printable("  ".join(map(str.ljust, row, widths))).rstrip())
