"""Compares two adapters on the same rows: their scores, and whether the later one is worse than chance explains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime import Runtime
from edgetune_runtime.errors import UsageError

from edgetune.common.progress import Progress
from edgetune.curation.checking.findings import VALIDATION
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import ScoredRow, score
from edgetune.tasks.metrics import per_conversation

RowsByAdapter = Mapping[str, Mapping[str, Sequence[TaskRow]]]
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
    """The mean score before and after on `rows` rows, the standard error of the difference, and what changed.

    The scores are means over `conversations`, as answers in one of them are not independent.
    Scores are between 0 and 1. If `is_loss`, they are bits per byte of text instead, of which fewer are better, and
    which do not depend on the tokenizer. `before_ms` and `after_ms` are the mean times per row on this machine.
    `left_out` more rows do not fit in the context of one of the bundles, and `still_wrong` has the answers that did not
    change and get no point.
    """

    before: float
    after: float
    error: float
    rows: int
    conversations: int
    answers: tuple[ChangedAnswer, ...] = ()
    is_loss: bool = False
    before_ms: float = 0.0
    after_ms: float = 0.0
    left_out: int = 0
    still_wrong: tuple[ChangedAnswer, ...] = ()

    @property
    def difference(self) -> str:
        """The difference in points, or in bits per byte, with its standard error."""
        change = self.after - self.before
        if self.is_loss:
            return f"{change:+.3f} ± {self.error:.3f}"
        return f"{change * 100:+.1f} ± {self.error * 100:.1f} points"

    @property
    def gain(self) -> float:
        """How much better the later score is."""
        return self.before - self.after if self.is_loss else self.after - self.before

    def is_worse(self, margin: float = 1.0) -> bool:
        """Whether the score got worse by more than `margin` standard errors, which a single row does not have."""
        # One lost answer among any number is a loss of exactly one standard error, apart from rounding.
        return self.conversations > 1 and self.gain < -margin * self.error * (1 + 1e-9)

    def text(self, value: float) -> str:
        """A score for people."""
        return f"{value:.3f} bits/byte" if self.is_loss else f"{value:.1%}"

    def to_json(self, margin: float = 1.0) -> dict[str, Any]:
        """The figures as JSON values, with `is_worse`."""
        return {**asdict(self), "is_worse": self.is_worse(margin)}


Changes = Mapping[str, Mapping[str, Change]]
"""For each adapter, the change on each set of rows."""


@dataclass(frozen=True)
class ScoredSet:
    """The scored rows of a set that fit in the context, how many do not, and the mean time per row."""

    details: Sequence[ScoredRow]
    too_long: int
    ms_per_row: float


Scores = Mapping[str, Mapping[str, ScoredSet]]
"""The sets of rows of each adapter, as a bundle answered them."""


def sets_of(
    name: str, validation: Sequence[TaskRow], kind: str, more: Sequence[TaskRow], progress: Progress
) -> dict[str, Sequence[TaskRow]]:
    """The rows to compare an adapter on: those for validation and `more` of a `kind`, without empty sets.

    Of validation rows only those that the metric can score are given, which may be none; UsageError without any rows.
    """
    sets = {key: rows for key, rows in ((VALIDATION, validation), (kind, more)) if rows}
    if not sets:
        message = f"adapter {name!r} has no validation row that can be scored"
        raise UsageError(message, "add some with prompts that no training row has, or choose another metric")
    if not validation:
        progress.say(f"warning: {name}: no validation row can be scored, so only the {kind} rows are compared")
    return sets


def scored(bundle: Path, rows: RowsByAdapter, progress: Progress) -> Scores:
    """The answers of a bundle to the rows of each adapter."""
    progress.say(f"scoring {bundle}")
    with Runtime.open(bundle, disk_mb=0) as runtime:
        return {
            name: {kind: _scored_set(runtime, name, kind_rows, progress) for kind, kind_rows in sets.items()}
            for name, sets in rows.items()
        }


def changes_between(before: Scores, after: Scores) -> Changes:
    """What changed from one bundle to another on the same rows."""
    return {
        name: {kind: change_between(old, after[name][kind]) for kind, old in sets.items()}
        for name, sets in before.items()
    }


def worse_sets(changes: Changes, margin: float = 1.0) -> list[tuple[str, str]]:
    """The adapters that got worse by more than `margin` standard errors, each with the set of rows on which it did."""
    return [(name, kind) for name, sets in changes.items() for kind, each in sets.items() if each.is_worse(margin)]


def change_between(before: ScoredSet, after: ScoredSet) -> Change:
    """The change of the scores of the rows that both have. UsageError if there are none."""
    later = {(row.where, row.prompt): row for row in after.details}
    pairs = [(old, later[key]) for old in before.details if (key := (old.where, old.prompt)) in later]
    if not pairs:
        message = "no row fits in the context of both bundles"
        raise UsageError(message, "use shorter rows, or a larger context_length")
    # Rows that do not fit in one of the bundles may join others of the other one.
    olds, news = (per_conversation((pair[0].conversation, _point(pair[side])) for pair in pairs) for side in (0, 1))
    differences = [new - old for old, new in zip(olds, news, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    answers = [
        ChangedAnswer(old.prompt, old.reference, old.answer, new.answer, new.score - old.score) for old, new in pairs
    ]
    return Change(
        statistics.fmean(olds),
        statistics.fmean(news),
        error,
        len(pairs),
        len(differences),
        tuple(answer for answer in answers if answer.before != answer.after),
        is_loss=pairs[0][0].bits_per_byte is not None,
        before_ms=before.ms_per_row,
        after_ms=after.ms_per_row,
        left_out=len(before.details) + before.too_long - len(pairs),
        still_wrong=tuple(
            answer
            for answer, (_, new) in zip(answers, pairs, strict=True)
            if answer.before == answer.after and new.score == 0
        ),
    )


def _point(row: ScoredRow) -> float:
    return row.score if row.bits_per_byte is None else row.bits_per_byte


def _scored_set(runtime: Runtime, name: str, rows: Sequence[TaskRow], progress: Progress) -> ScoredSet:
    begin = time.perf_counter()
    evaluation = score(runtime, name, rows, progress)
    ms_per_row = (time.perf_counter() - begin) * 1e3 / evaluation.rows
    return ScoredSet(evaluation.details, evaluation.too_long, ms_per_row)
