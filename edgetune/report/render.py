"""Renders the facts of a bundle as an HTML report or as a model card in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune_devices.fit import Fit

from edgetune.common.templates import template_of
from edgetune.tasks.confidence import MIN_ROWS, THRESHOLDS, sure_from

from .facts import AdapterFacts, Facts
from .learning_curve import LearningCurve

PAGE, CARD = (Path(__file__).with_name(name) for name in ("page.html.jinja", "card.md.jinja"))
WIDTH, HEIGHT = 520, 150
"""Size of a curve's plot area, in pixels."""


@dataclass(frozen=True)
class Curve:
    """The losses of a training run as points of SVG polylines, and the values at the ends of the axes.

    `ships` is where the checkpoint that ships is, None if the manifest does not say; `rose_from` is the x after which
    the validation loss rose, None if it did not.
    """

    train: str
    validation: str
    highest: float
    lowest: float
    first_step: int
    last_step: int
    ships: tuple[float, float] | None
    rose_from: float | None


def page(facts: Facts, fits: Sequence[Fit], learning: Sequence[LearningCurve] = ()) -> str:
    """The report: one page that needs neither a network nor a script. `learning` are curves of its adapters."""
    curves = {item.entry.name: curve(item) for item in facts.adapters}
    shown = {"facts": facts, "fits": fits, "curves": curves, "learning": learning, "least_rows": MIN_ROWS}
    return template_of(PAGE).render(shown, width=WIDTH, height=HEIGHT, thresholds=THRESHOLDS, sure_from=sure_from)


def card(facts: Facts) -> str:
    """The model card, with the metadata that model hubs read."""
    return template_of(CARD, autoescape=False).render(facts=facts)


def curve(adapter: AdapterFacts) -> Curve | None:
    """The curve of an adapter's training; None with fewer than two validation passes."""
    points = adapter.points
    if len(points) < 2:
        return None
    losses = [loss for _, train, validation in points for loss in (train, validation)]
    highest, lowest = max(losses), min(losses)
    steps = [step for step, _, _ in points]

    def place(step: int, loss: float) -> tuple[float, float]:
        x = WIDTH * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return x, HEIGHT * (highest - loss) / ((highest - lowest) or 1)

    def line(losses: Iterable[float]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in zip(steps, losses, strict=True))

    training = adapter.entry.training
    by_step: dict[int | None, tuple[float, float]] = {step: place(step, loss) for step, _, loss in points}
    rose_from = by_step.get(training.get("overfit_step"))
    return Curve(
        train=line(train for _, train, _ in points),
        validation=line(validation for _, _, validation in points),
        highest=highest,
        lowest=lowest,
        first_step=steps[0],
        last_step=steps[-1],
        ships=by_step.get(training.get("shipped_step")),
        rose_from=None if rose_from is None else rose_from[0],
    )
