"""Renders a comparison and its plots as one self-contained HTML page, from page.html.jinja."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from edgetune.common.templates import template_of

from .columns import (
    NONE,
    ON_ENGINE,
    PLACEMENTS,
    TEXT_COLUMNS,
    TRAINING,
    busy_notes,
    engine_rows,
    placement_rows,
    training_rows,
)
from .comparison import Comparison
from .figures import LOWER_IS_BETTER
from .plots import Picture

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def page(comparison: Comparison, pictures: Sequence[Picture]) -> str:
    """The page of a comparison, its plots inlined."""
    trials = comparison.outcomes
    placed = list(placement_rows(trials))
    on_boards = [trial for trial in trials if trial.board is not None]
    explained = (*ON_ENGINE, *TRAINING, *(PLACEMENTS if placed else ()))
    return template_of(TEMPLATE).render(
        comparison=comparison,
        better="lower" if comparison.metric in LOWER_IS_BETTER else "higher",
        recommended=comparison.recommended,
        on_engine=ON_ENGINE,
        engine_rows=list(engine_rows(trials)),
        notes=busy_notes(trials),
        training=TRAINING,
        training_rows=list(training_rows(trials)),
        placements=PLACEMENTS,
        placement_rows=placed,
        boards=on_boards,
        too_large=[trial for trial in on_boards if trial.board is not None and not trial.board.fits],
        pictures=[{"caption": picture.caption, "data": _inlined(picture.path)} for picture in pictures],
        meanings={column.title: column.meaning for column in explained},
        text_columns=TEXT_COLUMNS,
        no_figure=NONE,
    )


def _inlined(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
