"""Plans the steps of a training run: rows per step, learning rate and validation. Deterministic for a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from edgetune.objectives.base import TrainingRow
from edgetune.recipe.training import TrainingSpec

R = TypeVar("R", bound="TrainingRow")

# Rows are sorted by length within windows of this many steps: little padding, but a different order in each epoch.
_WINDOW_STEPS = 16
SHARED_COST = 0.1
"""What a token that all rows begin with costs in each row, of the memory and about of the time of a token of its own:
its keys and values are read there again."""


class Schedule:
    """Number of steps of a training run, the learning rate of each, and the steps after which it validates."""

    def __init__(self, rows: int, training: TrainingSpec) -> None:
        self.steps_per_epoch = math.ceil(rows / training.batch_size)
        self.steps = max(1, math.ceil(training.epochs * self.steps_per_epoch))
        if training.max_steps is not None:
            self.steps = min(self.steps, training.max_steps)
        self._warmup_steps = math.ceil(training.warmup * self.steps)
        self._form = training.schedule
        passes = min(self.steps, max(training.evals, math.ceil(self.steps / self.steps_per_epoch)))
        self.evals = frozenset(number * self.steps // passes for number in range(1, passes + 1))

    def factor(self, step: int) -> float:
        """Factor on the learning rate at `step`, counting from 0."""
        if step < self._warmup_steps:
            return (step + 1) / (self._warmup_steps + 1)
        progress = (step - self._warmup_steps) / max(1, self.steps - self._warmup_steps)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[self._form]


def plan(lengths: Sequence[int], schedule: Schedule, training: TrainingSpec, first: int = 0) -> Iterator[list[int]]:
    """The row indices of every step of a run from `first` on, with rows of similar length together."""
    epoch, place = divmod(first, schedule.steps_per_epoch)
    for step in range(first - place, schedule.steps, schedule.steps_per_epoch):
        yield from _epoch(lengths, training, epoch)[place : schedule.steps - step]
        epoch, place = epoch + 1, 0


def _epoch(lengths: Sequence[int], training: TrainingSpec, epoch: int) -> list[list[int]]:
    """The row indices of every step of an epoch."""
    rng = random.Random(f"{training.seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    window = _WINDOW_STEPS * training.batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [near[i : i + training.batch_size] for i in range(0, len(near), training.batch_size)]
    rng.shuffle(batches)
    return batches


def passes(examples: Sequence[R], most_tokens: int, shared: int = 0) -> Iterator[list[R]]:
    """Split the examples into groups of at most `most_tokens` tokens; a longer example is a group of its own.

    A group computes the `shared` first tokens, which are the same in all examples, once. The gradient of a step is the
    same however it is split.
    """
    group: list[R] = []
    tokens = 0
    for example in examples:
        own = len(example.tokens) - shared + round(shared * SHARED_COST)
        if group and tokens + own > most_tokens:
            yield group
            group = []
        tokens = own + (tokens if group else shared)
        group.append(example)
    if group:
        yield group
