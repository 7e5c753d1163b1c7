"""Renders checks as one HTML page: pictures of lengths, balance and likelihoods, and the rows with problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.common.templates import template_of

from .findings import KINDS, TaskCheck

TEMPLATE = Path(__file__).with_name("page.html.jinja")
WIDTH, HEIGHT = 520, 120
"""Size of a picture, in pixels."""
SHOWN = 60
"""Problems of each kind on the page."""
_BARS = 24


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: its place and size in pixels, and what it stands for."""

    x: float
    width: float
    height: float
    label: str
    is_too_long: bool = False


def page_of(name: str, checks: Sequence[TaskCheck]) -> str:
    """The page of a recipe's checks, which needs neither a network nor a script."""
    return template_of(TEMPLATE).render(
        name=name,
        checks=checks,
        kinds=KINDS,
        lengths={check.name: length_bars(check.tokens, check.context_length) for check in checks},
        curves={check.name: doubt_curve(check) for check in checks},
        width=WIDTH,
        height=HEIGHT,
        shown=SHOWN,
    )


def length_bars(tokens: Sequence[int], context_length: int) -> list[Bar]:
    """A histogram of lengths; all rows that do not fit in the context are in the last bar."""
    fitting = [count for count in tokens if count <= context_length]
    labels, counts = list[str](), list[int]()
    if fitting:
        least, most = min(fitting), max(fitting)
        step = max(1, math.ceil((most - least + 1) / _BARS))
        labels = [f"{start} tokens or more" for start in range(least, most + 1, step)]
        counts = [0] * len(labels)
        for count in fitting:
            counts[(count - least) // step] += 1
    has_long = len(fitting) < len(tokens)
    if has_long:
        labels.append(f"more than the context of {context_length} tokens")
        counts.append(len(tokens) - len(fitting))
    width, last = WIDTH / len(counts), len(counts) - 1
    return [
        Bar(place * width, width, HEIGHT * count / max(counts), f"{label}: {count}", has_long and place == last)
        for place, (label, count) in enumerate(zip(labels, counts, strict=True))
    ]


def doubt_curve(check: TaskCheck) -> str:
    """The relative likelihoods of all answers, from the lowest, as points of a polyline; empty without an estimate."""
    if check.estimate is None:
        return ""
    rows = check.estimate.rows
    return " ".join(
        f"{WIDTH * place / max(1, len(rows) - 1):.1f},{HEIGHT * (1 - row.relative):.1f}"
        for place, row in enumerate(rows)
    )
