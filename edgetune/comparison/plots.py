"""Plots a comparison as PNG files: score against size, speed and training rows, and loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_export import backends
from matplotlib import color_sequences, colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .columns import BUSY
from .curves import curves_of
from .figures import LOWER_IS_BETTER, EngineFigures, TrialResult

SIZE_INCHES = (8.0, 4.8)
DPI = 120
# Markers of the formats, sorted by name, and of any other.
MARKERS = "os^v"
OTHER_MARKER = "D"
_ROWS = "rows.png"
LEGEND_ROWS = 20
"""Entries of a legend in one column, as many as fit the height."""


@dataclass(frozen=True)
class Picture:
    """A plot's file and caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class _Point:
    """The score of a trial in one format, at the value `x` of the other axis."""

    x: float
    figures: EngineFigures
    target: str
    color: Any
    is_hollow: bool = False


def plots(outcomes: Sequence[TrialResult], out: Path) -> list[Picture]:
    """Write all plots of the finished trials to the folder `out`; none if no trial is finished.

    A learning curve of an earlier comparison there is deleted.
    """
    (out / _ROWS).unlink(missing_ok=True)
    finished = [outcome for outcome in outcomes if outcome.status == "done"]
    if not finished:
        return []
    speeds = "Score on the device against decoding speed, with unmerged and merged adapters"
    busy = f"; {BUSY} timed on a busy machine" if any(map(_was_slow, finished)) else ""
    drawn: tuple[tuple[str, Callable[[Sequence[TrialResult]], Figure], str], ...] = (
        ("score-size.png", _sizes, "Score on the device against the size of the adapter on disk"),
        ("score-speed.png", _speeds, speeds + busy),
        ("loss.png", _losses, "Validation loss during training; a ring marks the checkpoint that ships"),
    )
    if curves_of(finished):
        drawn = ((_ROWS, _rows, "Score on the device against the number of training rows"), *drawn)
    pictures = []
    for name, draw, caption in drawn:
        draw(finished).savefig(out / name)
        pictures.append(Picture(out / name, caption))
    return pictures


def _sizes(finished: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure(finished[0].metric)
    points = [_Point(figures.bytes / 1e6, figures, target, color) for target, figures, color in _each(finished)]
    axes.set(xlabel="adapter on disk (MB)", xscale="log")
    least, most = (choose(point.x for point in points) for choose in (min, max))
    _plain_ticks(axes.xaxis, [least, most])
    _draw(axes, points)
    if most < 2 * least:
        # Sizes that are nearly equal are shown as such.
        axes.set_xlim(least / 2, most * 2)
    _add_legend(axes, [outcome.name for outcome in finished])
    return figure


def _speeds(finished: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure(finished[0].metric)
    points = [
        _Point(speed, figures, target, color, is_hollow)
        for target, figures, color in _each(finished)
        for speed, is_hollow in ((figures.tokens_per_s, False), (figures.merged_tokens_per_s, True))
        if speed is not None
    ]
    axes.set(xlabel="decoding (tokens/s); hollow: merged into the base")
    axes.set_xlim(0, max(point.x for point in points) * 1.12)
    _draw(axes, points)
    _add_legend(axes, [outcome.name + (BUSY if _was_slow(outcome) else "") for outcome in finished])
    return figure


def _losses(finished: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure("")
    for outcome, color in zip(finished, _colors(len(finished)), strict=True):
        assert outcome.training is not None
        points = outcome.training.history
        axes.plot([p.epoch for p in points], [p.val_loss for p in points], "o-", color=color, markersize=3.5)
        shipped = next(p for p in points if p.step == outcome.training.shipped_step)
        axes.plot([shipped.epoch], [shipped.val_loss], "o", color=color, markersize=9, fillstyle="none")
    axes.set(xlabel="epoch", ylabel="validation loss (nats per token)")
    low, high = axes.get_ylim()
    if low > 0 and high > 10 * max(low, 1e-9):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, [low, high])
    _add_legend(axes, [outcome.name for outcome in finished])
    return figure


def _rows(finished: Sequence[TrialResult]) -> Figure:
    """Learning curves, with bands of one standard error."""
    curves = curves_of(finished)
    figure, axes = _figure(finished[0].metric)
    for curve, color in zip(curves, _colors(len(curves)), strict=True):
        scores, errors = zip(*((point.score, point.standard_error) for point in curve.figures), strict=True)
        low, high = (
            [max(0.0, score + sign * error) for score, error in zip(scores, errors, strict=True)] for sign in (-1, 1)
        )
        axes.plot(curve.rows, scores, "o-", color=color)
        axes.fill_between(curve.rows, low, high, color=color, alpha=0.15)
    counts = sorted({count for curve in curves for count in curve.rows})
    axes.set(xlabel="training rows", xscale="log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    _add_legend(axes, [curve.name for curve in curves])
    return figure


def _was_slow(outcome: TrialResult) -> bool:
    return any(figures.slow for figures in outcome.engines.values())


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:  # noqa: ANN401 - matplotlib has no types
    """Ticks of a logarithmic axis as plain numbers, few enough to be readable."""
    digits = (1.0, 2.0, 5.0) if max(values) < 1000 * min(values) else (1.0,)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _figure(metric: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    if metric:
        axes.set_ylabel(f"{metric} on the device" + (" (lower is better)" if metric in LOWER_IS_BETTER else ""))
    return figure, axes


def _each(finished: Sequence[TrialResult]) -> Iterator[tuple[str, EngineFigures, Any]]:
    """Format, figures and colour of each trial in each format."""
    for outcome, color in zip(finished, _colors(len(finished)), strict=True):
        for target, figures in outcome.engines.items():
            yield target, figures, color


def _colors(count: int) -> list[Any]:
    if count > 20:
        return [colormaps["turbo"](number / (count - 1)) for number in range(count)]
    return list(color_sequences["tab10" if count <= 10 else "tab20"][:count])


def _draw(axes: Any, points: Sequence[_Point]) -> None:  # noqa: ANN401 - matplotlib has no types
    """Draw points with their standard errors, and a marker of each format for the legend."""
    markers = dict(zip(backends.names(), MARKERS, strict=False))
    for point in points:
        marker, score, error = (
            markers.get(point.target, OTHER_MARKER),
            point.figures.score,
            point.figures.standard_error,
        )
        face = "white" if point.is_hollow else point.color
        axes.errorbar(point.x, score, error, color=point.color, alpha=0.35, capsize=3, zorder=1)
        axes.plot(point.x, score, marker, color=point.color, markerfacecolor=face, markersize=8, zorder=3)
    for target in sorted({point.target for point in points}):
        axes.plot([], [], markers.get(target, OTHER_MARKER), color="tab:gray", label=target)
    axes.margins(x=0.12, y=0.15)


def _add_legend(axes: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - as above
    """Add a legend beside the plot, with a line in the colour of each trial."""
    for name, color in zip(names, _colors(len(names)), strict=True):
        axes.plot([], [], color=color, linewidth=4, label=name)
    columns = math.ceil(len(axes.get_legend_handles_labels()[0]) / LEGEND_ROWS)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns, frameon=False)
