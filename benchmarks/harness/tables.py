"""Writes Markdown tables of figures, and messages while a benchmark runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any


def markdown(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table with a line per row; `columns` has the format of the cells of each column.

    A format is one of `str.format`, such as "{ttft_ms[p50]:.0f}"; True becomes yes, False no. A cell is empty if a
    figure in it is missing or None.
    """
    cells = [[_cell(row, template) for template in columns.values()] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Mapping[str, Any], template: str) -> str:
    words = {name: "yes" if value else "no" for name, value in row.items() if isinstance(value, bool)}
    try:
        return template.format_map({**row, **words}).replace("|", "¦")
    except (KeyError, TypeError):
        return ""


def progress(text: str) -> None:
    """Print a message to standard error: standard output is for the results."""
    print(text, file=sys.stderr, flush=True)
