"""The result of checking a task's rows: problems with their rows, lengths, balance, and likelihoods of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgetune.tasks.data import TaskRow

TRAIN, VALIDATION, CONFIDENCE, TEST = "train", "validation", "confidence", "test"
SPLITS = (TRAIN, VALIDATION, CONFIDENCE, TEST)
UNUSABLE, MISFIT, TOO_LONG, CONFLICT = "unusable", "misfit", "too_long", "conflict"
REPEAT, NEAR_REPEAT, SHARED, NEAR_SHARED, RARE = "repeat", "near_repeat", "shared", "near_shared", "rare"
WRONG = "wrong_label"
_LEAST_KNOWN = 0.05
"""Adapters that would give fewer of the answers themselves hardly know the task."""

KINDS = {
    UNUSABLE: "rows that cannot be used",
    MISFIT: "answers of another form than the output or the others, or with a text that is not in the prompt",
    TOO_LONG: "rows that do not fit in the context, and are left out of the training",
    CONFLICT: "prompts with different answers",
    WRONG: "answers that are probably wrong (a model that has not seen them prefers another one)",
    SHARED: "prompts that are in several splits, so a score on them says little",
    NEAR_SHARED: "rows of several splits with nearly the same prompt (and the same answer, where one is right)",
    REPEAT: "rows that repeat another one",
    NEAR_REPEAT: "rows with nearly the same prompt and the same answer",
    RARE: "kinds of answers with few rows",
}
"""The kinds of problems, the most serious first."""


@dataclass(frozen=True)
class SplitRow:
    """A row and the split that it is in."""

    split: str
    row: TaskRow


@dataclass(frozen=True)
class Finding:
    """One problem: where its rows are, their splits, prompts and answers, and what to know about it.

    `own` is what the model answers instead.
    """

    kind: str
    where: tuple[str, ...]
    splits: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    note: str = ""
    own: str | None = None

    @property
    def remark(self) -> str:
        """The note, or the splits if there are several."""
        return self.note or ", ".join(self.splits if len(self.splits) > 1 else ())

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each prompt with its answer; those that are the same once."""
        return list(dict.fromkeys(zip(self.prompts, self.answers, strict=True)))

    @classmethod
    def of(cls, kind: str, rows: Sequence[SplitRow], note: str = "", own: str | None = None) -> Finding:
        """The finding about these rows."""
        return cls(
            kind,
            tuple(item.row.where for item in rows),
            tuple(split for split in SPLITS if any(item.split == split for item in rows)),
            tuple(item.row.prompt for item in rows),
            tuple(item.row.completion or "" for item in rows),
            note,
            own,
        )


@dataclass(frozen=True)
class JudgedRow:
    """How likely an answer of a row is to adapters that were not trained on it.

    `likelihood` is the probability of its least likely token; `relative` is the lowest probability of a token relative
    to that of the likeliest one in its place, 1 if it is the answer that the model would give. It is lowered if the
    prompt lacks a value of the answer, in a field whose values most prompts have; `times` is 1 / `relative` without
    that. `own` is the model's answer if the row's is probably wrong; `weight` is then below 1, and smaller the less
    likely the row's answer is.
    """

    where: str
    likelihood: float
    relative: float
    own: str | None = None
    weight: float = 1.0
    times: float = 1.0


@dataclass(frozen=True)
class LabelEstimate:
    """The judged answers, the most doubtful one first; for `unjudged` ones the time was too short.

    `epochs` are those of each training, and `seconds` is the whole time. `needed_minutes` is the time limit with which
    each training reads its rows once; None if it did.
    """

    rows: Sequence[JudgedRow]
    unjudged: int
    epochs: float
    seconds: float
    needed_minutes: int | None = None

    @property
    def share(self) -> float:
        """The share of the answers that was judged."""
        return len(self.rows) / (len(self.rows) + self.unjudged)

    @property
    def summary(self) -> str:
        """How many answers are probably wrong, how well the adapters know the task, and what is lacking."""
        count = len(self.rows)
        wrong, known = sum(row.own is not None for row in self.rows), sum(row.relative >= 1 for row in self.rows)
        parts = [f"{wrong} of {count} answers are probably wrong", f"the adapters would give {known} themselves"]
        if self.needed_minutes is not None:
            read = f"each adapter was trained on {self.epochs:.0%} of its rows, which is too little to know the task"
            parts.append(f"{read}: give --minutes {self.needed_minutes}")
        elif known < _LEAST_KNOWN * count:
            parts.append("they hardly know the task, so some may be missed: give more rows, epochs or --minutes")
        if self.unjudged:
            parts.append(f"judged {self.share:.0%} of the answers, the shortest: more need a larger --minutes")
        return "; ".join(parts)


@dataclass(frozen=True)
class TaskCheck:
    """The check of one task.

    `sources` names the data of each split, and `rows` counts its rows. `tokens` are the lengths of all rows, estimated
    without the base's file. `balance` counts the rows of each kind of answer by split.
    """

    name: str
    metric: str
    context_length: int
    sources: Mapping[str, str]
    rows: Mapping[str, int]
    findings: Sequence[Finding]
    tokens: Sequence[int]
    is_estimated: bool
    balance: Mapping[str, Mapping[str, int]]
    estimate: LabelEstimate | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many problems there are of each kind that was found, the most serious first."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def of_kind(self, kind: str) -> list[Finding]:
        """The problems of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """The check as JSON values; of the lengths, the shortest, the median and the longest."""
        ordered = sorted(self.tokens)
        lengths = {"shortest": ordered[0], "median": ordered[len(ordered) // 2], "longest": ordered[-1]}
        return {
            "metric": self.metric,
            "sources": dict(self.sources),
            "rows": dict(self.rows),
            "counts": self.counts,
            "tokens": {**lengths, "estimated": self.is_estimated},
            "balance": {kind: dict(rows) for kind, rows in self.balance.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "labels": None if self.estimate is None else asdict(self.estimate),
        }
