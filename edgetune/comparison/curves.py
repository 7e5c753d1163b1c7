"""Learning curves: the scores of a method over the number of training rows, and what more rows would give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .figures import LOWER_IS_BETTER, EngineFigures, TrialResult

# The number of rows to estimate the score for, as a multiple of the most rows.
_MORE = 2


@dataclass(frozen=True)
class Curve:
    """The figures of a method and rank on its first engine, by number of training rows, in ascending order.

    Each is a score on `scored_rows`.
    """

    name: str
    metric: str
    scored_rows: int
    rows: Sequence[int]
    figures: Sequence[EngineFigures]

    @property
    def outlook(self) -> str:
        """The measured scores, and an estimate for twice the most rows if these score best, in one sentence."""
        last, more = self.figures[-1], _MORE * self.rows[-1]
        scores = [f"{each.score:.3f} with {rows}" for rows, each in zip(self.rows, self.figures, strict=True)]
        sentence = f"{self.name}: {self.metric} {', '.join([f'{scores[0]} rows', *scores[1:]])}"
        if self.metric in LOWER_IS_BETTER:
            return sentence
        # A curve that is flat at its end goes on like that, however much it rose before.
        best = max(self.figures[:-1], key=lambda each: each.score)
        error, gain = max(best.standard_error, last.standard_error), last.score - best.score
        if gain <= error:
            how = "more than one standard error ({}) below" if gain < -error else "within one standard error ({}) of"
            shown = f"{how.format(f'{error:.2g}')} the best before" if last.score else "no answer is right"
            return f"{sentence}, {shown}; the scores do not show that more rows would help"
        return f"{sentence}; {more} rows would give about {max(last.score, self.estimate(more)):.2f}"

    def estimate(self, rows: int) -> float:
        """The score with so many rows: the share of errors as a power of the rows, fitted to the measured ones."""
        # Half an error stands for none, which has no logarithm.
        least = 0.5 / self.scored_rows
        errors = [math.log(max(1 - figures.score, least)) for figures in self.figures]
        line = statistics.linear_regression([math.log(count) for count in self.rows], errors)
        return 1 - math.exp(line.intercept + line.slope * math.log(rows))


def curves_of(outcomes: Sequence[TrialResult]) -> list[Curve]:
    """A curve for each method and rank that was trained on at least two numbers of rows."""
    groups: dict[tuple[str, int | None], list[TrialResult]] = {}
    for outcome in outcomes:
        if outcome.status == "done":
            groups.setdefault((outcome.method, outcome.rank), []).append(outcome)
    curves = []
    for (method, rank), group in groups.items():
        trials = sorted(group, key=lambda trial: trial.trained_rows)
        if len(trials) > 1:
            name = method if rank is None else f"{method}-r{rank}"
            figures = [next(iter(trial.engines.values())) for trial in trials]
            counts = [trial.trained_rows for trial in trials]
            curves.append(Curve(name, trials[0].metric, trials[0].rows, counts, figures))
    return curves
