"""Comparison and plots in, one self-contained HTML page out; it needs neither a network nor a script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from .columns import (
    NONE,
    ON_ENGINE,
    PLACEMENTS,
    TEXT_COLUMNS,
    TRAINING,
    Column,
    busy_notes,
    engine_rows,
    placement_rows,
    training_rows,
)
from .comparison import Comparison
from .figures import LOWER_IS_BETTER, TrialResult
from .plots import Picture
from .recommend import Recommendation

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.note, figcaption, dl { color: #5a6676; font-size: .875rem; }
.recommended { border-left: 4px solid #2a7d4f; background: #eef7f1; padding: .6rem .9rem; margin: 1rem 0; }
.undecided { border-left-color: #b7791f; background: #fdf6e7; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e3e7ec; text-align: right; }
th { color: #5a6676; font-weight: 600; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
tr.chosen td { background: #eef7f1; font-weight: 600; }
td.reason { text-align: left; color: #9a4a1f; white-space: normal; min-width: 18rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
dt { float: left; clear: left; font-weight: 600; margin-right: .5rem; }
dd { margin: 0; }
""".strip()


def page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The page of a comparison, its plots inlined."""
    task, metric = comparison.task, comparison.metric
    better = "the lower the better" if metric in LOWER_IS_BETTER else "the higher the better"
    scored = f"Scored by {metric} ({better}) on {comparison.rows} rows." if metric else ""
    chosen = comparison.recommended
    title = f"Ways of tuning compared: {task}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="note">Base {escape(comparison.base)}. {escape(scored)} The best score comes first.</p>',
            *([_recommended(chosen)] if chosen is not None else []),
            "<h2>On the device</h2>",
            *_table(ON_ENGINE, engine_rows(comparison.outcomes), (chosen.name, chosen.target) if chosen else None),
            *(f'<p class="note">{escape(note)}.</p>' for note in busy_notes(comparison.outcomes)),
            "<h2>Training</h2>",
            *_table(TRAINING, training_rows(comparison.outcomes), (chosen.name,) if chosen else None),
            *_placements(comparison.outcomes),
            *_boards(comparison.outcomes),
            *(_figure(picture) for picture in pictures),
            "<h2>What the columns hold</h2>",
            *_meanings(comparison.outcomes),
            "</html>",
            "",
        ]
    )


def _recommended(chosen: Recommendation) -> str:
    if chosen.undecided:
        why = f"<b>Nothing can be recommended on the score:</b> {escape(chosen.undecided)}."
        return f'<p class="recommended undecided">{why} By size alone: Take {escape(chosen.name)}.</p>'
    return f'<p class="recommended"><b>Take {escape(chosen.name)}.</b> {escape(chosen.reason)}.</p>'


def _table(columns: Sequence[Column], rows: Iterable[tuple[str, ...]], chosen: tuple[str, ...] | None) -> list[str]:
    lines = ['<div class="scroll"><table>']
    lines.append(f"<tr>{''.join(_cell('th', column, column.title) for column in columns)}</tr>")
    for row in rows:
        mark = ' class="chosen"' if chosen is not None and row[: len(chosen)] == chosen else ""
        *cells, last = zip(columns, row, strict=False)
        shown = "".join(_cell("td", *cell) for cell in cells)
        rest = len(columns) - len(cells)
        end = _cell("td", *last) if rest == 1 else f'<td class="reason" colspan="{rest}">{escape(last[1])}</td>'
        lines.append(f"<tr{mark}>{shown}{end}</tr>")
    return [*lines, "</table></div>"]


def _cell(tag: str, column: Column, text: str) -> str:
    kind = ' class="text"' if column.title in TEXT_COLUMNS else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def _placements(outcomes: Sequence[TrialResult]) -> list[str]:
    """What each placement costs and gave, where a trial's modules were chosen by it."""
    rows = list(placement_rows(outcomes))
    return ["<h2>Choosing the modules</h2>", *_table(PLACEMENTS, rows, None)] if rows else []


def _boards(outcomes: Sequence[TrialResult]) -> list[str]:
    """Which bundles the recipe's board cannot hold."""
    boards = [(outcome.name, outcome.board) for outcome in outcomes if outcome.board is not None]
    if not boards:
        return []
    first = boards[0][1]
    too_big = [f"{name} ({board.needed_mb:.0f} MB)" for name, board in boards if not board.fits]
    what = f"too large for it: {', '.join(too_big)}" if too_big else "all of these fit"
    return [f'<p class="note">{escape(f"{first.name} leaves {first.available_mb:.0f} MB; {what}.")}</p>']


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}.</figcaption></figure>'
    )


def _meanings(outcomes: Sequence[TrialResult]) -> list[str]:
    placements = PLACEMENTS if any(placement_rows(outcomes)) else ()
    columns = {column.title: column.meaning for column in (*ON_ENGINE, *TRAINING, *placements)}
    lines = [f"<dt>{escape(title)}</dt><dd>{escape(meaning)}</dd>" for title, meaning in columns.items()]
    return ["<dl>", *lines, f"<dt>{NONE}</dt><dd>there is no such figure</dd>", "</dl>"]
