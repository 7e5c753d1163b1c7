"""Values in sentences: percentages, degrees, colors, times and things to play, in words and as arguments."""

from __future__ import annotations

import random
from typing import Any

from .templates import words

Said = tuple[dict[str, str], dict[str, Any]]
"""The parts of a template to fill in, and the arguments of the call."""

_TIMES: tuple[tuple[str, dict[str, int]], ...] = (
    ("half an hour", {"minutes": 30}), ("an hour", {"hours": 1}), ("a minute", {"minutes": 1}),
    ("an hour and a half", {"hours": 1, "minutes": 30}), ("a quarter of an hour", {"minutes": 15}),
)  # fmt: skip


def value(argument: str, rng: random.Random) -> Said:
    """A value of this argument of a tool."""
    if argument == "color":
        color = rng.choice(words()["colors"])
        return {"color": color}, {"color": color}
    if argument == "search_query":
        query = rng.choice(words()["queries"])
        return {"query": query}, {"search_query": query}
    if argument == "temperature":
        kelvin = rng.randrange(2200, 6501, 100)
        return {"kelvin": str(kelvin)}, {"temperature": kelvin}
    if argument == "degrees":
        degrees: float = rng.randint(15, 27) if rng.random() < 0.8 else rng.randint(60, 80)
        if rng.random() < 0.1:
            degrees += 0.5
        return {"n": f"{degrees:g}{rng.choice((' degrees', ' degrees', '', '°'))}"}, {"temperature": degrees}
    return _percentage(argument, rng)


def _percentage(argument: str, rng: random.Random) -> Said:
    draw = rng.random()
    if draw < 0.06:
        return {"n": rng.choice(("half", "a half"))}, {argument: 50}
    number = (
        rng.randrange(10, 101, 10) if draw < 0.5 else rng.randrange(5, 100, 5) if draw < 0.8 else rng.randint(1, 100)
    )
    return {"n": f"{number}{rng.choice((' percent', ' percent', '%', '%', ''))}"}, {argument: number}


def duration(rng: random.Random) -> tuple[str, dict[str, int]]:
    """A time for a timer: how it is said, and its hours, minutes and seconds."""
    if rng.random() < 0.2:
        return rng.choice(_TIMES)
    parts: dict[str, int] = {}
    for unit in rng.choice(
        (["minutes"], ["minutes"], ["minutes"], ["hours"], ["seconds"], ["hours", "minutes"], ["minutes", "seconds"])
    ):
        parts[unit] = (
            rng.randint(1, 5) if unit == "hours" else rng.choice((5, 10, 15, 20, 25, 30, 45, rng.randint(2, 59)))
        )
    return " and ".join(f"{number} {unit[:-1] if number == 1 else unit}" for unit, number in parts.items()), parts
