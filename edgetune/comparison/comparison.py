"""A finished comparison: the outcome of each trial and the recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .curves import curves_of
from .figures import TrialResult
from .recommend import Recommendation


@dataclass(frozen=True)
class Comparison:
    """The outcomes of a task's trials, best score first, and the recommended one.

    `rows` is how many rows of `source` were scored.
    """

    task: str
    base: str
    metric: str
    rows: int
    source: str
    outcomes: Sequence[TrialResult]
    recommended: Recommendation | None

    @property
    def more_rows(self) -> list[str]:
        """What more training rows would give, a sentence per method and rank; empty without learning curves."""
        return [curve.outlook for curve in curves_of(self.outcomes)]

    def to_json(self) -> dict[str, Any]:
        """The contents of compare.json and the output of `--json`.

        `undecided` is the reason why the scores do not decide, else null; `recommended` is then the smallest adapter.
        """
        return {
            "task": self.task,
            "base": self.base,
            "metric": self.metric,
            "rows": self.rows,
            "source": self.source,
            "trials": [asdict(outcome) for outcome in self.outcomes],
            "recommended": self.recommended and self.recommended.name,
            "target": self.recommended and self.recommended.target,
            "reason": self.recommended and self.recommended.reason,
            "undecided": (self.recommended and self.recommended.undecided) or None,
            "more_rows": self.more_rows,
        }
