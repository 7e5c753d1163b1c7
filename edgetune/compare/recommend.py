"""Outcomes in, the recommended trial and its reason in one sentence out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .figures import OnEngine, Outcome, goodness, megabytes


@dataclass(frozen=True)
class Recommendation:
    """The trial to take, in which format, and why."""

    name: str
    target: str
    reason: str


@dataclass(frozen=True)
class _Candidate:
    outcome: Outcome
    target: str
    figures: OnEngine

    @property
    def goodness(self) -> float:
        return goodness(self.outcome.metric, self.figures.score)


def recommend(outcomes: Sequence[Outcome]) -> Recommendation | None:
    """The smallest adapter, in bytes on disk, within one standard error of the best score on the device's engines.

    What the recipe's board cannot hold does not count, unless it can hold none. Of adapters of the same size, the one
    with the better score. None when no trial succeeded.
    """
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    fitting = [outcome for outcome in done if outcome.board is None or outcome.board.fits]
    candidates = [
        _Candidate(outcome, target, figures)
        for outcome in fitting or done
        for target, figures in outcome.engines.items()
    ]
    if not candidates:
        return None
    best = max(candidates, key=lambda found: (found.goodness, -found.figures.bytes))
    enough = [found for found in candidates if found.goodness >= best.goodness - best.figures.standard_error]
    chosen = min(enough, key=lambda found: (found.figures.bytes, -found.goodness))
    return Recommendation(chosen.outcome.name, chosen.target, _reason(chosen, best, _board(done, fitting)))


def _board(done: Sequence[Outcome], fitting: Sequence[Outcome]) -> str:
    board = next((outcome.board.name for outcome in done if outcome.board is not None), None)
    if board is None:
        return ""
    return f" that fits {board}" if fitting else f", though none fits {board}"


def _reason(chosen: _Candidate, best: _Candidate, board: str) -> str:
    metric, size = chosen.outcome.metric, f"{megabytes(chosen.figures.bytes)} MB"
    own, top = f"{chosen.figures.score:.4g}", f"{best.figures.score:.4g}"
    if chosen == best:
        return (
            f"{chosen.outcome.name} in {chosen.target} has the best {metric} ({own}) on the device's engine, and no "
            f"smaller adapter than its {size} comes within one standard error ({best.figures.standard_error:.2g})"
            f"{board and f' of those{board}' if board.startswith(' that') else board}"
        )
    return (
        f"{chosen.outcome.name} in {chosen.target} is the smallest adapter ({size}){board} whose {metric} on the "
        f"device's engine ({own}) is within one standard error ({best.figures.standard_error:.2g}) of the best "
        f"({top}, {best.outcome.name} in {best.target})"
    )
