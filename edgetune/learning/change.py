"""Compares two adapters on the same rows: their scores, and whether the later one is worse than chance explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime

from edgetune.evaluation import ScoredRow, score
from edgetune.progress import Progress
from edgetune.tasks.data import TaskRow

RowsByAdapter = dict[str, dict[str, Sequence[TaskRow]]]
"""For each adapter, sets of rows by their names."""


@dataclass(frozen=True)
class ChangedAnswer:
    """The answers before and after to a row, and how much higher the score of the later one is."""

    prompt: str
    expected: str
    before: str
    after: str
    gain: float


@dataclass(frozen=True)
class Change:
    """The mean score before and after on `rows` rows, the standard error of the difference, and what changed."""

    before: float
    after: float
    error: float
    rows: int
    answers: tuple[ChangedAnswer, ...] = ()

    @property
    def difference(self) -> str:
        """The difference in points, with its standard error."""
        return f"{(self.after - self.before) * 100:+.1f} ± {self.error * 100:.1f}"

    @property
    def is_worse(self) -> bool:
        """Whether the score fell by more than one standard error."""
        return self.after < self.before - self.error

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values, with `is_worse`."""
        return {**asdict(self), "is_worse": self.is_worse}


def change_between(before: Sequence[ScoredRow], after: Sequence[ScoredRow]) -> Change:
    """The change of the scores of the same rows."""
    differences = [new.score - old.score for old, new in zip(before, after, strict=True)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else 0.0
    means = [statistics.fmean(row.score for row in rows) for rows in (before, after)]
    answers = tuple(
        ChangedAnswer(old.prompt, old.reference, old.answer, new.answer, new.score - old.score)
        for old, new in zip(before, after, strict=True)
        if old.answer != new.answer
    )
    return Change(means[0], means[1], error, count, answers)


def scored(bundle: Path, rows: RowsByAdapter, progress: Progress) -> dict[str, dict[str, tuple[ScoredRow, ...]]]:
    """The answers of a bundle to the rows of each adapter."""
    with Runtime.open(bundle, disk_mb=0) as runtime:
        return {
            name: {kind: score(runtime, name, own, progress).details for kind, own in sets.items()}
            for name, sets in rows.items()
        }
