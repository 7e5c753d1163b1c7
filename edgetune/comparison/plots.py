"""Plots a comparison as PNG files: score against size, score against decoding speed, and loss curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export import backends

from .columns import BUSY
from .figures import LOWER_IS_BETTER, EngineFigures, TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 4.8)
DPI = 120
# Markers of the formats, sorted by name, and of any other.
MARKERS = "os^v"
OTHER_MARKER = "D"
# Directions to try for a label, best first, and distances in points.
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_DISTANCES = (7, 14, 22, 32, 44, 58)


@dataclass(frozen=True)
class Picture:
    """A plot's file and caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    error: float
    label: str
    color: Any
    marker: str
    is_hollow: bool = False


def plots(outcomes: Sequence[TrialResult], out: Path) -> list[Picture]:
    """Write all plots of the finished trials to the folder `out`; none if no trial is finished."""
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    if not done:
        return []
    marked = any(figures.slow for outcome in done for figures in outcome.engines.values())
    speeds = "Score on the device against decoding speed, with unmerged and merged adapters"
    drawn = (
        ("score-size.png", _sizes, "Score on the device against the size of the adapter on disk"),
        ("score-speed.png", _speeds, speeds + (f"; {BUSY} timed on a busy machine" if marked else "")),
        ("loss.png", _losses, "Validation loss during training; a ring marks the checkpoint that ships"),
    )
    pictures = []
    for name, draw, caption in drawn:
        figure = draw(done)
        figure.savefig(out / name)
        pictures.append(Picture(out / name, caption))
    return pictures


def _sizes(done: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure(done[0].metric)
    points = [
        _Point(figures.bytes / 1e6, figures.score, figures.standard_error, label, color, _marker(target))
        for label, color, target, figures in _each(done)
    ]
    axes.set(xlabel="adapter on disk (MB)", xscale="log")
    _plain_ticks(axes.xaxis, [point.x for point in points])
    _draw(figure, axes, points)
    return figure


def _speeds(done: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure(done[0].metric)
    points = []
    for label, color, target, of in _each(done):
        for speed, is_hollow in ((of.tokens_per_s, False), (of.merged_tokens_per_s, True)):
            if speed is not None:
                name = label if not is_hollow or of.tokens_per_s is None else ""
                name += BUSY if name and of.slow else ""
                points.append(_Point(speed, of.score, of.standard_error, name, color, _marker(target), is_hollow))
    axes.set(xlabel="decoding (tokens/s); hollow: merged into the base")
    axes.set_xlim(0, max(point.x for point in points) * 1.12)
    _draw(figure, axes, points)
    return figure


def _losses(done: Sequence[TrialResult]) -> Figure:
    figure, axes = _figure("")
    for outcome, color in zip(done, _colors(len(done)), strict=True):
        assert outcome.training is not None
        epochs, _, losses = zip(*outcome.training.history, strict=True)
        axes.plot(epochs, losses, "o-", color=color, markersize=3.5, label=outcome.name)
        best = min(outcome.training.history, key=lambda point: point[2])
        axes.plot([best[0]], [best[2]], "o", color=color, markersize=9, fillstyle="none")
    axes.set(xlabel="epoch", ylabel="validation loss (nats per token)")
    low, high = axes.get_ylim()
    if low > 0 and high > 10 * max(low, 1e-9):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, [low, high])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:  # noqa: ANN401 - matplotlib has no types
    """Ticks of a logarithmic axis as plain numbers, few enough to be readable."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter  # noqa: PLC0415 - slow to import

    digits = (1.0, 2.0, 5.0) if max(values) < 1000 * min(values) else (1.0,)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _figure(metric: str) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    if metric:
        axes.set_ylabel(f"{metric} on the device" + (" (lower is better)" if metric in LOWER_IS_BETTER else ""))
    return figure, axes


def _each(done: Sequence[TrialResult]) -> Iterator[tuple[str, Any, str, EngineFigures]]:
    """Label, colour, engine and figures of each point."""
    for outcome, color in zip(done, _colors(len(done)), strict=True):
        for target, figures in outcome.engines.items():
            yield outcome.name, color, target, figures


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(number % palette.N) for number in range(count)]


def _marker(target: str) -> str:
    return _markers().get(target, OTHER_MARKER)


def _markers() -> dict[str, str]:
    return dict(zip(backends.names(), MARKERS, strict=False))


def _draw(figure: Figure, axes: Any, points: Sequence[_Point]) -> None:  # noqa: ANN401 - matplotlib has no types
    """Draw points with their standard errors, their labels, and a legend of the engines."""
    for point in points:
        face = "white" if point.is_hollow else point.color
        axes.errorbar(point.x, point.y, point.error, color=point.color, alpha=0.35, capsize=3, zorder=1)
        axes.plot(point.x, point.y, point.marker, color=point.color, markerfacecolor=face, markersize=8, zorder=3)
    for target, marker in _markers().items():
        if any(point.marker == marker for point in points):
            axes.plot([], [], marker, color="tab:gray", label=target)
    axes.margins(x=0.12, y=0.15)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(MARKERS), frameon=False)
    figure.draw_without_rendering()
    # Fix the layout: labels are placed around what is drawn so far.
    figure.set_layout_engine("none")
    _label(figure, axes, points)


def _label(figure: Figure, axes: Any, points: Sequence[_Point]) -> None:  # noqa: ANN401 - as above
    """Place each point's label at the nearest position where it overlaps neither a label nor a point."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    from matplotlib.transforms import Bbox  # noqa: PLC0415 - slow to import

    centres = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    for point in points:
        if point.label:
            taken.append(_place(axes, point, taken, renderer))


def _place(axes: Any, point: _Point, taken: Sequence[Any], renderer: Any) -> Any:  # noqa: ANN401 - as above
    text = axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=(0, 0),
        textcoords="offset points",
        color=point.color,
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": point.color, "alpha": 0.5, "shrinkB": 4},
    )
    best, least = None, float("inf")
    for distance in _DISTANCES:
        for across, up in _DIRECTIONS:
            _move(text, across * distance, up * distance)
            box = _extent(text, renderer)
            covered = sum(box.overlaps(other) for other in taken) + 3 * (not _is_inside(box, axes))
            if covered < least:
                best, least = (across * distance, up * distance), covered
            if not covered:
                text.arrow_patch.set_visible(distance > _DISTANCES[1])
                return box
    assert best is not None
    _move(text, *best)
    return _extent(text, renderer)


def _extent(text: Any, renderer: Any) -> Any:  # noqa: ANN401 - as above
    from matplotlib.text import Text  # noqa: PLC0415 - slow to import

    # The extent of an annotation would include its line to the point.
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _move(text: Any, across: float, up: float) -> None:  # noqa: ANN401 - as above
    text.set_position((across, up))
    text.set_ha("left" if across > 0 else "right" if across < 0 else "center")
    text.set_va("bottom" if up > 0 else "top" if up < 0 else "center")


def _is_inside(box: Any, axes: Any) -> bool:  # noqa: ANN401 - as above
    area = axes.bbox
    return bool(area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1)
