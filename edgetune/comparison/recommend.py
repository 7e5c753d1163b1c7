"""Recommends a trial and gives the reason in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .figures import EngineFigures, TrialResult, goodness, megabytes


@dataclass(frozen=True)
class Recommendation:
    """The recommended trial, its format, and the reason.

    `undecided` says why the scores do not decide, and what would help; the trial is then the smallest.
    """

    name: str
    target: str
    reason: str
    undecided: str = ""


@dataclass(frozen=True)
class _Candidate:
    outcome: TrialResult
    target: str
    figures: EngineFigures

    @property
    def goodness(self) -> float:
        return goodness(self.outcome.metric, self.figures.score)


def recommend(outcomes: Sequence[TrialResult]) -> Recommendation | None:
    """The smallest adapter, in bytes on disk, within one standard error of the best score on the device's engines.

    Trials that do not fit on the recipe's board are ignored, unless none fits. Of adapters of the same size, the one
    with the better score. If all scored 0, or are within one standard error of each other, it is the smallest of all,
    and `undecided`. Times and speeds are not considered. None if no trial succeeded.
    """
    finished = [outcome for outcome in outcomes if outcome.status == "done"]
    fitting = [outcome for outcome in finished if outcome.board is None or outcome.board.fits]
    candidates = [
        _Candidate(outcome, target, figures)
        for outcome in fitting or finished
        for target, figures in outcome.engines.items()
    ]
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: (candidate.goodness, -candidate.figures.bytes))
    undecided = _undecided(candidates, best)
    lowest = best.goodness - best.figures.standard_error
    eligible = candidates if undecided else [candidate for candidate in candidates if candidate.goodness >= lowest]
    chosen = min(eligible, key=lambda candidate: (candidate.figures.bytes, -candidate.goodness))
    board = _board(finished, fitting)
    reason = _smallest(chosen, board) if undecided else _reason(chosen, best, board)
    return Recommendation(chosen.outcome.name, chosen.target, reason, undecided)


def _undecided(candidates: Sequence[_Candidate], best: _Candidate) -> str:
    """Why the scores do not decide between the trials, and what would help; empty if they do."""
    names = {candidate.outcome.name for candidate in candidates}
    metric, rows = best.outcome.metric, best.outcome.rows
    trials = "the trial" if len(names) == 1 else f"all {len(names)} trials"
    if all(candidate.figures.score == 0 for candidate in candidates):
        remedy = f"train longer or on more rows, and check in the answers that {metric} is the right metric"
        return f"{trials} scored 0; {remedy}"
    if len(names) == 1:
        return ""
    error = best.figures.standard_error
    apart = best.goodness - min(candidate.goodness for candidate in candidates)
    if apart == 0:
        return f"{trials} scored {best.figures.score:.4g}; score on more than {rows} rows, or on harder ones"
    if apart > error:
        return ""
    reason = f"{trials} are within one standard error ({error:.2g}) of each other"
    return f"{reason}; score on more than {rows} rows, or train longer"


def _smallest(chosen: _Candidate, board: str) -> str:
    size = megabytes(chosen.figures.bytes)
    return f"{chosen.outcome.name} in {chosen.target}, only by size: the smallest adapter ({size} MB){board}"


def _board(finished: Sequence[TrialResult], fitting: Sequence[TrialResult]) -> str:
    board = next((outcome.board.name for outcome in finished if outcome.board is not None), None)
    if board is None:
        return ""
    return f" that fits {board}" if fitting else f", though none fits {board}"


def _reason(chosen: _Candidate, best: _Candidate, board: str) -> str:
    metric, size = chosen.outcome.metric, f"{megabytes(chosen.figures.bytes)} MB"
    score, best_score = f"{chosen.figures.score:.4g}", f"{best.figures.score:.4g}"
    if chosen == best:
        fits, note = (board, "") if board.startswith(" that") else ("", board)
        return (
            f"{chosen.outcome.name} in {chosen.target} has the best {metric} ({score}) on the device's engine, and no "
            f"adapter smaller than its {size}{fits} is within one standard error "
            f"({best.figures.standard_error:.2g}){note}"
        )
    return (
        f"{chosen.outcome.name} in {chosen.target} is the smallest adapter ({size}){board} whose {metric} on the "
        f"device's engine ({score}) is within one standard error ({best.figures.standard_error:.2g}) of the best "
        f"({best_score}, {best.outcome.name} in {best.target})"
    )
