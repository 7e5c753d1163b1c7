"""How long training takes: predicted from measured speeds, or estimated from its first ten steps. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgetune.objectives.base import TrainingRow, row_length
from edgetune.recipe.training import TrainingSpec

from .schedule import Schedule

TRIAL_STEPS = 10
"""Steps after which the speed of this machine is estimated."""

# The first steps also set up caches and thread pools.
_WARMUP_STEPS = 2
# Cost of a validation token relative to a training token: it needs no backward pass.
_VALIDATION_COST = 0.5
# What low-rank trainings reached on two cores of an AMD EPYC with validation in between, the slowest and the fastest in
# docs/measurements.md, in 10^9 weights times row tokens per second. SmolLM2-135M, with 0.1345 of these weights, trained
# in bf16 at 313 tokens/s (SNIPS) to 763 (smart-home), and a base of 0.5B in between; in float32 on AVX2 at 139 (rows of
# 512 tokens) to 342 (smart-home); in int8 1.2 to 1.4 times as fast as that, at most at 421.
_SPEEDS = {"bf16": (42, 103), "fp32": (19, 46), "int8": (23, 57)}
_MEASURED_CORES = 2


@dataclass(frozen=True)
class TrainingTime:
    """The seconds that training takes at the fastest and at the slowest speed that was measured."""

    min_s: float
    max_s: float

    def __str__(self) -> str:
        least, most = duration(self.min_s), duration(self.max_s)
        return f"about {most}" if least == most else f"about {least} to {most}"


def predicted_time(trainings: Collection[tuple[str, float]], cores: int) -> TrainingTime:
    """Predict the time on the CPU from the precision of each training, and its weights times row tokens.

    Two cores were measured. The speed of more is taken to be in between that of two and one in proportion.
    """
    share = cores / _MEASURED_CORES
    slow, fast = (sum(work / (_SPEEDS[precision][end] * 1e9) for precision, work in trainings) for end in (0, 1))
    return TrainingTime(fast / share, slow / min(1.0, share))


def validation_tokens(rows: Sequence[TrainingRow]) -> float:
    """The tokens of a validation pass over the rows, at their lower cost."""
    return sum(map(row_length, rows)) * _VALIDATION_COST


def tokens_left(
    train: Sequence[TrainingRow], validation: Sequence[TrainingRow], training: TrainingSpec, step: int = 0
) -> float:
    """About how many tokens a training run has left after `step` steps; those of validation count at their lower cost.

    `validation` are the rows of one validation pass. Early stopping is not considered.
    """
    schedule = Schedule(len(train), training)
    rows = (schedule.steps - step) / schedule.steps_per_epoch * sum(map(row_length, train))
    passes = sum(eval_step > step for eval_step in schedule.evals)
    return rows + passes * validation_tokens(validation)


class TimeTrial:
    """Measures the first steps of a training run and estimates the time left, once.

    `left` is the number of tokens left in this run, `later` that of the runs after it.
    """

    def __init__(self, name: str, left: float, later: float) -> None:
        self._name, self._left, self._later = name, left, later
        self._steps, self._tokens, self._started = 0, 0, 0.0

    def step(self, tokens: int, now: float) -> str | None:
        """Record that a step of `tokens` tokens ended at `now` seconds; returns the estimate once, as a message."""
        self._steps += 1
        self._left -= tokens
        if self._steps <= _WARMUP_STEPS:
            self._started = now
            return None
        self._tokens += tokens
        if self._steps != TRIAL_STEPS or now <= self._started:
            return None
        if self._left + self._later < self._tokens:
            return None  # nearly done, an estimate is of no use
        speed = self._tokens / (now - self._started)
        in_all = f", {duration((self._left + self._later) / speed)} including the training runs after it"
        return (
            f"{self._name}: about {duration(self._left / speed)} left at {speed:.0f} tokens/s"
            f"{in_all if self._later else ''}"
        )


def duration(seconds: float) -> str:
    """Seconds as text, rounded up to the precision of an estimate: seconds, minutes, or hours and minutes."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
