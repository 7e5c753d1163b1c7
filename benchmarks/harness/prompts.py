"""Prompts of a given length: each word is one token of SmolLM2."""

from __future__ import annotations

from itertools import cycle, islice

WORDS = "lamp heater window kitchen garden music alarm morning evening quiet bright never always answer short plain"


def words(count: int) -> str:
    """A text of this many words."""
    return " ".join(islice(cycle(WORDS.split()), count))
