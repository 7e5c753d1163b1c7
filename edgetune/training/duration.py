"""How long trainings will take on this machine, from the first ten steps of one. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .schedule import Schedule, plan

if TYPE_CHECKING:
    from edgetune.objectives.base import TrainingRow
    from edgetune.recipe.parts import TrainingSpec

TRIAL_STEPS = 10
"""Steps of a training that tell how fast this machine is."""

# The first steps also set up caches and thread pools.
_WARMUP_STEPS = 2
# A token of a validation row against one of a training row: it needs no backward pass.
_VALIDATION_COST = 0.5


def tokens_left(
    train: Sequence[TrainingRow], validation: Sequence[TrainingRow], training: TrainingSpec, step: int = 0
) -> float:
    """Tokens that a training has before it after `step` steps, those of its validation passes at what they cost.

    `validation` are the rows of one pass. A training without patience left ends sooner.
    """
    schedule = Schedule(len(train), training)
    lengths = [len(row.tokens) for row in train]
    rows = sum(lengths[index] for indices in plan(lengths, schedule, training)[step:] for index in indices)
    passes = sum(done > step for done in schedule.evals)
    return rows + passes * sum(len(row.tokens) for row in validation) * _VALIDATION_COST


class TimeTrial:
    """The first steps of a training as a trial: tells its speed once, and what it means for all that is left.

    `left` are the tokens of the training from here on, `later` those of the trainings after it.
    """

    def __init__(self, name: str, left: float, later: float) -> None:
        self._name, self._left, self._later = name, left, later
        self._steps, self._tokens, self._started = 0, 0, 0.0

    def step(self, tokens: int, now: float) -> str | None:
        """A step of so many tokens ended `now`, in seconds; returns what the trial showed, once it is over."""
        self._steps += 1
        self._left -= tokens
        if self._steps <= _WARMUP_STEPS:
            self._started = now
            return None
        self._tokens += tokens
        if self._steps != TRIAL_STEPS or now <= self._started:
            return None
        if self._left + self._later < self._tokens:
            return None  # it is nearly over
        speed = self._tokens / (now - self._started)
        all_of_them = f", {duration((self._left + self._later) / speed)} with the trainings after it"
        return (
            f"{self._name}: about {duration(self._left / speed)} left at {speed:.0f} tokens/s"
            f"{all_of_them if self._later else ''}"
        )


def duration(seconds: float) -> str:
    """A length of time in words, rounded up to what an estimate is good for."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
