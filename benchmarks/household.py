"""The requests of a household's days, from the templates of examples/smart-home: its habits come again at their hours.

Most sentences are habits, the frequent ones far more often than the others (Zipf), in the same or in other words. Some
are new. The home reports what it has done, and events with values of the moment.
"""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[1] / "examples/smart-home/data/generate.py"
HABITS, KINDS_OF_EVENTS, ROOMS = 40, 30, 8
ORDERS_PER_DAY, EVENTS_PER_DAY = 120, 60
HOURS = (7, 8, 12, 17, 18, 19, 20, 21, 22)

Request = tuple[str, str]
"""An adapter's name and a prompt."""


@dataclass(frozen=True)
class Moment:
    """A sentence of somebody at home, or an event."""

    hour: float
    is_order: bool
    text: str


class Household:
    """Draws days of a home.

    `new` is the share of sentences that are not a habit, `reworded` that of the habits that are said in other words.
    """

    def __init__(self, seed: int, new: float, reworded: float) -> None:
        self._rng, self._new, self._reworded = random.Random(seed), new, reworded
        self._source = runpy.run_path(str(TEMPLATES))
        self._orders = self._source["read_templates"]("command")
        events = [one for one in self._source["read_templates"]("reply") if one.section[0] == "event"]
        self._rooms = set(self._rng.sample(list(self._source["AREAS"]), ROOMS))
        habits = [self._filled(self._rng.choice(self._orders)) for _ in range(HABITS)]
        said, hours = [self._said(habit) for habit in habits], [self._rng.choice(HOURS) for _ in habits]
        self._habits = list(zip(habits, said, hours, strict=True))
        self._events = self._rng.sample(events, KINDS_OF_EVENTS)

    def day(self, answer: Callable[[str, str], str]) -> Iterator[Request]:
        """The requests of the next day; `answer` gives the answer to one, which the home then reports."""
        for moment in sorted(self._moments(), key=lambda moment: moment.hour):
            if moment.is_order:
                yield "command", moment.text
            yield "reply", f"done: {answer('command', moment.text)}" if moment.is_order else moment.text

    def _moments(self) -> Iterator[Moment]:
        rng = self._rng
        for habit, said, hour in rng.choices(self._habits, _zipf(HABITS), k=ORDERS_PER_DAY):
            if rng.random() < self._new:
                yield Moment(rng.uniform(6, 23), True, self._said(self._filled(rng.choice(self._orders))))
            else:
                text = self._said(habit) if rng.random() < self._reworded else said
                yield Moment(rng.gauss(hour, 1.5) % 24, True, text)
        for template in rng.choices(self._events, _zipf(KINDS_OF_EVENTS), k=EVENTS_PER_DAY):
            values = self._filled(template).values
            yield Moment(rng.uniform(0, 24), False, self._source["replace"](template.sentence, values, rng))

    def _said(self, filled: Any) -> str:  # noqa: ANN401 - of generate.py
        return str(self._source["say"](filled, self._rng))

    def _filled(self, template: Any) -> Any:  # noqa: ANN401 - of generate.py
        """The template with values that this home has."""
        while True:
            filled = self._source["fill"](template, self._rng)
            if filled.values.get("area") in {None, *self._rooms}:
                return filled


def _zipf(count: int) -> list[float]:
    return [1 / (rank + 1) for rank in range(count)]
